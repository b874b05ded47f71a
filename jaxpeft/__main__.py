"""`python -m jaxpeft`: lists the commands of the package, each a module to run with `python -m`."""

from __future__ import annotations

import importlib
import sys

COMMANDS = ("train", "compare", "data.__main__", "plan", "export")


def main(argv: list[str]) -> int:
    """List the commands, each by the first line of its own help; return the exit code."""
    if unknown := [word for word in argv if word not in ("--help", "-h", "-help")]:
        sys.stderr.write(
            f"jaxpeft: {unknown[0]!r}: each command is a module, such as `python -m jaxpeft.train --help`\n"
        )
        return 2
    first = [str(importlib.import_module(f"jaxpeft.{name}").__doc__).split("\n")[0] for name in COMMANDS]
    sys.stdout.write("\n".join(["Commands of jaxpeft, each with --help:\n", *(f"    {line}" for line in first), ""]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
