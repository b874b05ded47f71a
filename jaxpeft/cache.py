"""The cache directory of this machine."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "JAXPEFT_CACHE"
OFF = "off"


def folder() -> Path | None:
    """Return the cache directory, or None if caching is off.

    It is `JAXPEFT_CACHE` from the environment (`off` for no caching), else `jaxpeft` in
    `XDG_CACHE_HOME`, else `~/.cache/jaxpeft`.
    """
    value = os.environ.get(VARIABLE)
    if value == OFF:
        return None
    if value:
        return Path(value).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxpeft"
