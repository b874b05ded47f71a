"""Where what is made once and read again lies on this machine."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "JAXPEFT_CACHE"
OFF = "off"


def folder() -> Path | None:
    """Return the folder of all caches, None where there is to be none.

    It is that of the environment's `JAXPEFT_CACHE`, `off` for none; else `jaxpeft` in
    `XDG_CACHE_HOME`, else `~/.cache/jaxpeft`.
    """
    named = os.environ.get(VARIABLE)
    if named == OFF:
        return None
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jaxpeft"
