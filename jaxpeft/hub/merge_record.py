"""`jaxpeft_merge.json` of a merged model: which adapters were merged into which base, and the
SHA-256 of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxpeft.errors import WeightsError
from jaxpeft.hub.weights import digests
from jaxpeft.hub.weights.safetensors_files import open_folder
from jaxpeft.json_files import read_json

MERGE = "jaxpeft_merge.json"


def records(folder: Path) -> list[Mapping[str, Any]]:
    """List the merges of a model, the latest first.

    Raises:
        WeightsError: The record is malformed.
    """
    if not (folder / MERGE).is_file():
        return []
    record = read_json(folder / MERGE)
    earlier, recorded = record.get("earlier", []), record.get("sha256", {})
    found: list[Any] = [record, *earlier] if isinstance(earlier, list) else [None]
    if not all(isinstance(one, dict) and isinstance(one.get("adapter", {}), dict) for one in found):
        raise WeightsError(
            f"{folder / MERGE}: adapter must be an object and earlier a list of objects; copy the"
            " model again"
        )
    if not digests.is_record(recorded):
        raise WeightsError(
            f"{folder / MERGE}: sha256: must map every tensor's name to its SHA-256; {_UNCHECKED}"
        )
    return found


_UNCHECKED = "remove 'sha256' to skip this check"


def require_undamaged(folder: Path) -> None:
    """Check the weights of a merged model against their recorded SHA-256.

    Several processes share the files between them. Other models have no record to check.

    Raises:
        WeightsError: Tensors differ; it names them.
    """
    found = records(folder)
    recorded: Mapping[str, str] = found[0].get("sha256", {}) if found else {}
    if not recorded:
        return
    where = {name: tensor.file for name, tensor in open_folder(folder).items()}
    own = sorted(set(where.values()))[jax.process_index() :: jax.process_count()]
    actual = {
        name: digest for file in own for name, digest in digests.file_tensors_sha256(file).items()
    }
    wanted = {name: digest for name, digest in recorded.items() if where.get(name) in (None, *own)}
    wrong = digests.find_differing(wanted, actual)
    fix = (
        f"copy the model again; if it was changed on purpose, remove 'sha256' from {folder / MERGE}"
    )
    if wrong:
        raise WeightsError(
            digests.describe_differing(wrong, lambda name: where.get(name, folder), MERGE, fix)
        )
