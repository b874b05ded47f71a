"""The commands of the package: each is a folder whose `__main__` is its command line."""

from __future__ import annotations

import importlib
from types import ModuleType

VERBS = ("train", "compare", "data", "plan", "export")


def command_line(verb: str) -> ModuleType:
    """Return the module of a command: its `main` runs it, `ARGUMENTS` is the class of its
    arguments, and its docstring its help.
    """
    return importlib.import_module(f"jaxpeft.{verb}.__main__")
