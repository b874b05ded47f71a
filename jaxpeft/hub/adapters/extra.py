"""`jaxpeft.json` of an adapter: the settings of the run, and the SHA-256 of each saved item.

A tensor that has changed since it was saved is an error. A field of a JSON file may have been
edited on purpose: it is accepted, with a warning.
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
"""The maximum number of fields that a message lists."""
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
"""Fields of `adapter_config.json` that do not affect the computation, or that `peft` fills in."""
_log = logging.getLogger(__name__)


def extra_content(settings: Settings, files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of `jaxpeft.json`.

    Args:
        settings: settings of the run.
        files: content of every other file by its name: the fields of a `.json`, the arrays of a
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
    """Read `jaxpeft.json`; empty if it does not exist, as for an adapter of another library.

    Raises:
        AdapterError: Fields are invalid; it lists all of them.
        WeightsError: The file is not a JSON object.
    """
    file = folder / EXTRA
    if not file.is_file():
        return {}
    extra = read_json(file)
    parse_settings(extra, file)
    recorded = extra.get("sha256", {})
    valid = isinstance(recorded, dict) and all(Path(name).name == name for name in recorded)
    if not valid or not all(map(digests.is_record, recorded.values())):
        raise AdapterError(
            f"{file}: sha256: must map each file name to the SHA-256 of its items; {_UNCHECKED}"
        )
    return extra


_UNCHECKED = "remove 'sha256' to skip this check"


def warn_of_edits(folder: Path, extra: Mapping[str, Any]) -> None:
    """Log which parts of an adapter were edited, or that its files cannot be checked.

    Args:
        folder: folder of the adapter.
        extra: its `jaxpeft.json`, from `read_extra`.
    """
    recorded: Mapping[str, Any] = extra.get("sha256", {})
    if not recorded:
        why = f"{EXTRA} has no sha256" if extra else f"no {EXTRA}"
        _log.info("%s: %s; the files are not checked for changes", folder, why)
    for name in sorted(recorded):
        if name.endswith(".json") and (folder / name).is_file():
            content = {
                key: value for key, value in read_json(folder / name).items() if key != "sha256"
            }
            edited = _find_edits(recorded[name], content)
            if edited:
                _log.warning(
                    "%s: edited since it was saved; the edited values are used: %s",
                    folder / name,
                    ", ".join(edited[:_SHOWN]),
                )


def _find_edits(recorded: Mapping[str, str], content: Mapping[str, Any]) -> list[str]:
    """List the fields whose value differs from the saved one; new fields are not ours."""
    found = digests.fields_sha256(content)
    return [
        name
        for name in digests.find_differing(recorded, found)
        if name in recorded and name not in _MOVED
    ]


def require_undamaged(folder: Path, extra: Mapping[str, Any]) -> None:
    """Raise an error if tensors have changed since they were saved.

    Args:
        folder: folder of the adapter.
        extra: its `jaxpeft.json`, from `read_extra`.

    Raises:
        AdapterError: Tensors have changed; it names them. The suggested fix depends on whether
            another library has saved the folder since.
    """
    recorded: Mapping[str, Any] = extra.get("sha256", {})
    for name in sorted(file for file in recorded if file.endswith(".safetensors")):
        if not (folder / name).is_file():
            continue  # the layout checks which files must exist
        wrong = digests.find_differing(recorded[name], digests.file_tensors_sha256(folder / name))
        if wrong:
            raise AdapterError(_damage(folder, name, wrong, recorded))


def _damage(folder: Path, name: str, wrong: list[str], recorded: Mapping[str, Any]) -> list[str]:
    new = sorted(read_json(folder / CONFIG).keys() - recorded.get(CONFIG, {}).keys())
    if CONFIG in recorded and new:
        return [
            (
                f"{folder}: another library saved this folder after {EXTRA} was written: the"
                f" SHA-256 of {len(wrong)} tensors of {name} differs, and {CONFIG} has new fields"
                f" ({', '.join(new[:3])}); if that was intended, remove 'sha256' from"
                f" {folder / EXTRA}; otherwise copy the adapter again"
            )
        ]
    fix = (
        "copy the adapter again; if it was changed on purpose, remove 'sha256' from"
        f" {folder / EXTRA}"
    )
    return digests.describe_differing(wrong, lambda _: folder / name, EXTRA, fix)
