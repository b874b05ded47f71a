"""Manifest of a checkpoint: a checksum for every file; written last, to commit the step.

Orbax does not checksum its arrays, so a flipped bit would be restored unnoticed. A checkpoint is
valid if its manifest is intact and has the right step, and every listed file has its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from jaxpeft import atomic

NAME = "manifest.json"
FORMAT = 2
"""Format 1 did not record the step."""
_AT_ONCE = 8
UNFINISHED = f"has no {NAME}: saving was interrupted"


def write(folder: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Commit the folder of a step.

    Args:
        folder: folder of the step, with all its files.
        step: number of the step.
        meta: plain JSON values to save with it.
    """
    files = _hashes(
        folder,
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()),
    )
    body = json.dumps(
        {"format": FORMAT, "step": step, "files": files, "meta": dict(meta)}, sort_keys=True
    )
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}) + "\n"
    atomic.write_text(folder / NAME, text, sync=True)


def read(folder: Path) -> dict[str, Any]:
    """Return the plain values saved by `write`.

    Args:
        folder: folder of a valid step.
    """
    return _body(folder)["meta"]


def is_numbered(folder: Path) -> bool:
    """Return whether the manifest of a valid step records the step; earlier versions did not."""
    return "step" in _body(folder)


def _body(folder: Path) -> dict[str, Any]:
    return json.loads(json.loads((folder / NAME).read_text())["body"])


def problem(folder: Path, step: int) -> str | None:
    """Return the problem with the folder of a step, or None if it is valid.

    Args:
        folder: folder of the step.
        step: expected step.
    """
    path = folder / NAME
    if not path.is_file():
        return UNFINISHED
    try:
        outer = json.loads(path.read_text())
        body: str = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            return f"{NAME} is damaged: its checksum does not match"
        plain = json.loads(body)
        files: dict[str, str] = plain["files"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{NAME} is damaged: it cannot be read"
    if (saved := plain.get("step", step)) != step:
        return f"contains step {saved}: the folder was renamed or copied; rename it to {saved}"
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for name, found in _hashes(folder, list(files)).items():
        if found != files[name]:
            return f"{name} is damaged: its checksum does not match"
    return None


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each file, computed in parallel, since other processes wait for it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(_sha256, (folder / name for name in names)), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
