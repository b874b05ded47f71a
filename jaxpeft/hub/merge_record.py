"""`jaxpeft_merge.json`, beside a merged model: what was merged into what, and the SHA-256 of every
tensor that was written.
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
    """List what is merged into a model, the last first.

    Raises:
        WeightsError: the record is not what it must be.
    """
    if not (folder / MERGE).is_file():
        return []
    record = read_json(folder / MERGE)
    earlier, recorded = record.get("earlier", []), record.get("sha256", {})
    found: list[Any] = [record, *earlier] if isinstance(earlier, list) else [None]
    if not all(isinstance(one, dict) and isinstance(one.get("adapter", {}), dict) for one in found):
        raise WeightsError(
            f"{folder / MERGE}: adapter, earlier: must be an object and a list of such; copy the"
            " model again"
        )
    if not digests.is_record(recorded):
        raise WeightsError(
            f"{folder / MERGE}: sha256: must hold the SHA-256 of every tensor by its name;"
            f" {_UNCHECKED}"
        )
    return found


_UNCHECKED = "remove 'sha256' there, and the tensors are no longer checked"


def require_undamaged(folder: Path) -> None:
    """Refuse the weights of a merged model that are not as they were written; those of any other
    model are not looked at.

    Of several processes each looks at some of the files.

    Raises:
        WeightsError: naming the tensors.
    """
    found = records(folder)
    recorded: Mapping[str, str] = found[0].get("sha256", {}) if found else {}
    if not recorded:
        return
    where = {name: tensor.file for name, tensor in open_folder(folder).items()}
    own = sorted(set(where.values()))[jax.process_index() :: jax.process_count()]
    there = {
        name: found for file in own for name, found in digests.file_tensors_sha256(file).items()
    }
    wanted = {name: digest for name, digest in recorded.items() if where.get(name) in (None, *own)}
    wrong = digests.find_differing(wanted, there)
    fix = (
        f"copy the model again; if it was changed on purpose, remove 'sha256' from {folder / MERGE}"
    )
    if wrong:
        raise WeightsError(
            digests.describe_differing(wrong, lambda name: where.get(name, folder), MERGE, fix)
        )
