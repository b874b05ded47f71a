"""Check names that become folders, so that nothing is written to unintended places."""

from __future__ import annotations

import re
from pathlib import Path

from jaxpeft.errors import ConfigError, shorten

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def problem(name: str) -> str | None:
    """Return why a name is invalid as a folder name, or None if it is valid."""
    if _NAME.fullmatch(name):
        return None
    return (
        f"{shorten(name)}: must be 1 to 64 letters, digits, '.', '_' or '-', and start with a"
        " letter or digit"
    )


def folder_named(root: Path, name: str) -> Path:
    """Return the folder of a name inside a root folder.

    Args:
        root: parent folder.
        name: 1 to 64 letters, digits, `.`, `_` and `-`, the first a letter or digit.

    Raises:
        ConfigError: the name is invalid, or the folder is a link out of the root.
    """
    if why := problem(name):
        raise ConfigError(f"name {why}")
    folder = root / name
    if folder.is_symlink() and not folder.resolve().is_relative_to(root.resolve()):
        raise ConfigError(
            f"name {name}: {folder} is a link to a folder outside of {root}; give another name"
        )
    return folder


def require_no_way_out(folder: Path) -> None:
    """Reject a folder with links to the outside, through which files would be written elsewhere.

    Raises:
        ConfigError: names each link.
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
                f"{path}: is a link out of the run's folder, to {path.resolve()}; remove it"
                for path in links
            ]
        )


def short_path(path: str) -> str:
    """Return the last two components of a path, for tables."""
    return "/".join(path.rsplit("/", 2)[-2:])
