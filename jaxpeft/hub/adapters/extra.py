"""`jaxpeft.json`, beside an adapter: the settings of the run, and the SHA-256 of all that was
saved, item by item.

A tensor that is not as it was saved is refused by its name. A field of a JSON file may have been
edited on purpose: it is believed as it stands, and told.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxpeft
from jaxpeft.errors import AdapterError
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.weights import digests
from jaxpeft.json_files import read_json

_SHOWN = 20
"""How many fields a message names."""
_MOVED = frozenset(
    {
        "base_model_name_or_path",
        "revision",
        "peft_version",
        "auto_mapping",
        "inference_mode",
        "runtime_config",
    }
)
"""Fields of `adapter_config.json` that change nothing of what is computed, or that `peft` fills in.
"""
_log = logging.getLogger(__name__)


def extra_content(settings: Settings, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `jaxpeft.json`.

    Args:
        settings: of the run.
        files: the content of every other file, by its name: fields of a `.json`, arrays of a
            `.safetensors`.
    """
    content = {"jaxpeft_version": jaxpeft.__version__} | settings.as_dict()
    saved = {
        name: (
            digests.arrays_sha256(items)
            if name.endswith(".safetensors")
            else digests.fields_sha256(items)
        )
        for name, items in files.items()
    }
    return content | {"sha256": {**saved, EXTRA: digests.fields_sha256(content)}}


def read_extra(folder: Path) -> dict[str, Any]:
    """Read `jaxpeft.json`; empty where there is none, as beside an adapter that another library has
    saved.

    Raises:
        AdapterError: listing every field that is not what it must be.
        WeightsError: it holds no JSON object.
    """
    file = folder / EXTRA
    if not file.is_file():
        return {}
    extra = read_json(file)
    parse_settings(extra, file)
    recorded = extra.get("sha256", {})
    good = isinstance(recorded, dict) and all(Path(name).name == name for name in recorded)
    if not good or not all(map(digests.is_record, recorded.values())):
        raise AdapterError(
            f"{file}: sha256: must hold the SHA-256 of every item by the name of its file;"
            f" {_UNCHECKED}"
        )
    return extra


_UNCHECKED = "remove 'sha256' there, and the files are no longer checked"


def warn_of_edits(folder: Path, extra: Mapping[str, Any]) -> None:
    """Tell what is believed of an adapter though nothing vouches for it.

    Args:
        folder: of the adapter.
        extra: its `jaxpeft.json`, as `read_extra` gives it.
    """
    recorded: Mapping[str, Any] = extra.get("sha256", {})
    if not recorded:
        why = f"{EXTRA} holds no sha256" if extra else f"there is no {EXTRA}"
        _log.info("%s: %s; that the files are as they were saved is not checked", folder, why)
    for name in sorted(recorded):
        if name.endswith(".json") and (folder / name).is_file():
            content = {
                key: value for key, value in read_json(folder / name).items() if key != "sha256"
            }
            edited = _find_edits(recorded[name], content)
            if edited:
                told = ", ".join(edited[:_SHOWN])
                _log.warning(
                    "%s: edited since it was saved, and accepted as it stands: %s",
                    folder / name,
                    told,
                )


def _find_edits(recorded: Mapping[str, str], content: Mapping[str, Any]) -> list[str]:
    """List fields that were saved with another value; those that are new since were not ours."""
    found = digests.fields_sha256(content)
    return [
        name
        for name in digests.find_differing(recorded, found)
        if name in recorded and name not in _MOVED
    ]


def require_undamaged(folder: Path, extra: Mapping[str, Any]) -> None:
    """Refuse tensors that are not as they were saved.

    Args:
        folder: of the adapter.
        extra: its `jaxpeft.json`, as `read_extra` gives it.

    Raises:
        AdapterError: naming the tensors; another remedy is told where another library has saved the
            folder since.
    """
    recorded: Mapping[str, Any] = extra.get("sha256", {})
    for name in sorted(file for file in recorded if file.endswith(".safetensors")):
        if not (folder / name).is_file():
            continue  # which files there must be, the layout says
        wrong = digests.find_differing(recorded[name], digests.file_tensors_sha256(folder / name))
        if wrong:
            raise AdapterError(_damage(folder, name, wrong, recorded))


def _damage(folder: Path, name: str, wrong: list[str], recorded: Mapping[str, Any]) -> list[str]:
    new = sorted(read_json(folder / CONFIG).keys() - recorded.get(CONFIG, {}).keys())
    if CONFIG in recorded and new:
        told = (
            f"{folder}: was saved again, by another library, since {EXTRA} was written:"
            f" {len(wrong)} tensors of {name} have another SHA-256, and {CONFIG} has new fields"
            f" ({', '.join(new[:3])}); if that was meant, remove 'sha256' from {folder / EXTRA}; if"
            " not, copy the adapter again"
        )
        return [told]
    fix = (
        "copy the adapter again; if it was changed on purpose, remove 'sha256' from"
        f" {folder / EXTRA}"
    )
    return digests.describe_differing(wrong, lambda _: folder / name, EXTRA, fix)
