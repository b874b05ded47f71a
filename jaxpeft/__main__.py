"""List the commands, and run one: `python -m jaxpeft`, also installed as `jaxpeft`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jaxpeft.command.parser import HELP
from jaxpeft.command.verbs import VERBS, command_line
from jaxpeft.errors import nearest, shorten


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that is named first, or list the commands; return the exit code.

    Args:
        argv: the arguments, without the program's name; those of the process by default.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in HELP:
        sys.stdout.write(_listing())
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
    """Return every command with the first sentence of its help."""
    lines = [f"  {name:9}{str(command_line(name).__doc__).splitlines()[0]}" for name in VERBS]
    return "\n".join(
        [
            "jaxpeft: parameter-efficient fine-tuning in JAX. Commands:",
            "",
            *lines,
            "",
            "jaxpeft COMMAND --help says more.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
