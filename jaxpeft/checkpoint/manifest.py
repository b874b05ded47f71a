"""The manifest of a saved step: what it holds, file by file, with checksums; written last, so that
it commits the step.

Orbax checks its index, not its arrays: a flipped bit in an array file is restored as it is. A step
is good where its manifest is whole, says the number of that step, and every file that it names has
the SHA-256 that it gives.
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
"""1 had no number of the step."""
_AT_ONCE = 8
UNFINISHED = f"has no {NAME}: its saving was interrupted"


def write(folder: Path, step: int, meta: Mapping[str, Any]) -> None:
    """Commit the folder of a step.

    Args:
        folder: of the step, with all its files.
        step: its number.
        meta: plain JSON values to keep with it.
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
    """Return the plain values that `write` was given.

    Args:
        folder: of a step that `problem` finds good.
    """
    return _body(folder)["meta"]


def is_numbered(folder: Path) -> bool:
    """Return whether the manifest of a good step says its number; that of an earlier version does
    not.
    """
    return "step" in _body(folder)


def _body(folder: Path) -> dict[str, Any]:
    return json.loads(json.loads((folder / NAME).read_text())["body"])


def problem(folder: Path, step: int) -> str | None:
    """Return what is wrong with the folder of a step, None where it is good.

    Args:
        folder: of the step.
        step: the number that it is taken for.
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
        return (
            f"holds step {saved}: its folder was renamed or copied; give it its name again, {saved}"
        )
    for name in files:
        if not (folder / name).is_file():
            return f"{name} is missing"
    for name, found in _hashes(folder, list(files)).items():
        if found != files[name]:
            return f"{name} is damaged: its checksum does not match"
    return None


def _hashes(folder: Path, names: list[str]) -> dict[str, str]:
    """Return the SHA-256 of each file, several at once: other processes of a run wait for it."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(_sha256, (folder / name for name in names)), strict=True))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
