"""List the commands, and run one: `python -m jaxpeft`, also installed as `jaxpeft`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import jaxpeft
from jaxpeft.command.parser import HELP
from jaxpeft.command.verbs import VERBS, command_line
from jaxpeft.errors import nearest, shorten


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command given as the first argument, or list the commands; return the exit code.

    Args:
        argv: arguments, without the program name; by default those of the process.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        sys.stdout.write(_listing())
        return 0
    if words[0] == "--version":
        sys.stdout.write(f"jaxpeft {jaxpeft.__version__}\n")
        return 0
    name, *rest = words
    if name not in VERBS:
        sys.stderr.write(
            f"jaxpeft: {shorten(name)!r}: no such command{nearest(name, VERBS)}; `jaxpeft --help`"
            " lists them\n"
        )
        return 2
    return command_line(name).main(rest)


def _listing() -> str:
    """Return all commands with the first line of their help."""
    lines = [f"  {name:10}{str(command_line(name).__doc__).splitlines()[0]}" for name in VERBS]
    return "\n".join(
        [
            "jaxpeft: parameter-efficient fine-tuning in JAX. Commands:",
            "",
            *lines,
            "",
            "Run `jaxpeft COMMAND --help` for details, `jaxpeft --version` for the version.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
