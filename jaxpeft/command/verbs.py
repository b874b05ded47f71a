"""Commands of the package: each is a folder with a `__main__` module."""

from __future__ import annotations

import importlib
from types import ModuleType

VERBS = ("train", "compare", "data", "plan", "report", "evaluate", "generate", "export")


def command_line(verb: str) -> ModuleType:
    """Return the module of a command, with `main`, the arguments class `ARGUMENTS`, and the help as
    docstring.
    """
    return importlib.import_module(f"jaxpeft.{verb}.__main__")
