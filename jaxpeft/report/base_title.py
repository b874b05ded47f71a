"""The name of a base in the title of a page."""

from __future__ import annotations

from pathlib import Path

from jaxpeft.hub.sources import public_name
from jaxpeft.names import short_path

_GENERIC = frozenset({"base", "checkpoint", "final", "hf", "main", "model", "pytorch", "weights"})
"""Names of folders that do not tell which model they contain."""


def base_title(path: str) -> str:
    """Return the name of a base: as in a model card, or the last two components of a folder whose
    last one is generic, such as `stories260K/hf`.

    Args:
        path: a folder, `package:NAME` or a hub id.
    """
    name = public_name(path)
    if name not in _GENERIC:
        return name
    return short_path(str(Path(path).expanduser().resolve()))
