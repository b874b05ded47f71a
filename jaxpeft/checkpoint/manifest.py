"""The manifest of a saved step: what it holds, file by file, with checksums; written last, so that it commits the step.

Orbax checks its index, not its arrays: a flipped bit in an array file is restored as it is. A step is good where its
manifest is whole and every file that it names has the SHA-256 that it gives.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
_AT_ONCE = 8
UNFINISHED = f"has no {NAME}: its saving was interrupted"


def write(folder: Path, meta: Mapping[str, Any]) -> None:
    """Commits the folder of a step.

    Args:
        folder: of the step, with all its files.
        meta: plain JSON values to keep with it.
    """
    files = _hashes(folder, sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()))
    body = json.dumps({"format": FORMAT, "files": files, "meta": dict(meta)}, sort_keys=True)
    text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body}) + "\n"
    temporary = folder / f".{NAME}.tmp"
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(folder / NAME)


def read(folder: Path) -> dict[str, Any]:
    """Gives the plain values that `write` was given.

    Args:
        folder: of a step that `problem` finds good.
    """
    return json.loads(json.loads((folder / NAME).read_text())["body"])["meta"]


def problem(folder: Path) -> str | None:
    """Says what is wrong with the folder of a step, None where it is good."""
    path = folder / NAME
    if not path.is_file():
        return UNFINISHED
    try:
        outer = json.loads(path.read_text())
        body: str = outer["body"]
        if hashlib.sha256(body.encode()).hexdigest() != outer["sha256"]:
            return f"{NAME} is damaged: its checksum does not match"
        files: dict[str, str] = json.loads(body)["files"]
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} is damaged: it cannot be read"
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for name, found in _hashes(folder, list(files)).items():
        if found != files[name]:
            return f"{name} is damaged: its checksum does not match"
    return None


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Gives the SHA-256 of each file, several at once: other processes of a run wait for it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(_sha256, (folder / name for name in names)), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
