"""Names that become folders: checked, so that nothing is written where nobody meant it to be."""

from __future__ import annotations

import re
from pathlib import Path

from jaxpeft.errors import ConfigError, shorten

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def problem(name: str) -> str | None:
    """Return why a name cannot be a folder's, None where it can."""
    if _NAME.fullmatch(name):
        return None
    return (
        f"{shorten(name)}: must be 1 to 64 letters, digits, '.', '_' or '-', and begin with a"
        " letter or a digit"
    )


def folder_named(root: Path, name: str) -> Path:
    """Return the folder of a name below a root.

    Args:
        root: the folder that holds all of them.
        name: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or a digit.

    Raises:
        ConfigError: the name is another, or a link that leads out of the root stands there.
    """
    if why := problem(name):
        raise ConfigError(f"name {why}")
    folder = root / name
    if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"name {name}: {folder} is a link that leads out of {root}; give another name"
        )
    return folder


def require_no_way_out(folder: Path) -> None:
    """Refuse a folder that holds links to somewhere else: what is written there would land
    elsewhere.

    Raises:
        ConfigError: naming each link.
    """
    if not folder.is_dir():
        return
    inside = folder.resolve()
    links = [
        path
        for path in sorted(folder.iterdir())
        if path.is_symlink() and not path.resolve().is_relative_to(inside)
    ]
    if links:
        raise ConfigError(
            [
                f"{path}: a link that leads out of the run's folder, to {path.resolve()}; remove it"
                for path in links
            ]
        )
