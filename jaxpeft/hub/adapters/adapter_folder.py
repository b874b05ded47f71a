"""The metadata of an adapter folder, and the base model that it asks for."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.errors import AdapterError, ConfigError, WeightsError
from jaxpeft.hub.adapters import peft_config
from jaxpeft.hub.adapters.extra import read_extra
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA
from jaxpeft.hub.adapters.load import layout_of, parts_of
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.sources import file_sha256, package_of
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.json_files import read_json

_NOT_THE_ADAPTER = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "task_type",
)
_HEAD = re.compile(
    r"(?:^|\.)(?:classifier|classifier\.out_proj|score)(?:\.modules_to_save(?:\.default)?)?\.weight$"
)
_EMBEDDING = re.compile(
    r"\.(?:embed_tokens|word_embeddings|tok_embeddings)"
    r"(?:\.modules_to_save(?:\.default)?|(?:\.token_adapter)?\.base_layer)?\.weight$"
)


@dataclass(frozen=True)
class AdapterFolder:
    """The metadata of an adapter folder.

    Attributes:
        folder: folder of the adapter.
        parts: folders of the parts of a mixed adapter; otherwise the folder itself.
        config: `adapter_config.json` of the first part.
        settings: settings of the run, of the first part; empty if jaxpeft did not save the adapter.
    """

    folder: Path
    parts: tuple[Path, ...]
    config: Mapping[str, Any]
    settings: Settings

    @property
    def base(self) -> str:
        """Name of its base, empty if not recorded; `package:NAME` for a packaged model's folder."""
        name = str(
            self.config.get("base_model_name_or_path") or self.config.get("model_name") or ""
        )
        return package_of(name) or name

    @property
    def sha256(self) -> str:
        """The hash of its tensors and options, but not of its base's name."""
        digests: list[str] = []
        for part in self.parts:
            options = {
                key: value
                for key, value in read_json(part / CONFIG).items()
                if key not in _NOT_THE_ADAPTER
            }
            digests.append(json.dumps(options, sort_keys=True))
            digests += [
                f"{file.name} {file_sha256(file)}" for file in sorted(part.glob("*.safetensors"))
            ]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def read_adapter(folder: Path) -> AdapterFolder:
    """Read the metadata of an adapter, without its tensors.

    Args:
        folder: its folder, or the folder of the run that trained it.

    Raises:
        AdapterError: It is not an adapter folder, or one of its files is missing or a pickle.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    inner = folder / "adapter"
    if inner.is_dir() and not (folder / CONFIG).is_file():
        folder = inner
    try:
        parts = parts_of(folder)
        for part in parts:
            layout_of(part)
        settings = parse_settings(read_extra(parts[0]), parts[0] / EXTRA)
        return AdapterFolder(folder, parts, read_json(parts[0] / CONFIG), settings)
    except WeightsError as error:
        raise AdapterError(error.problems) from error


def base_of(adapter: AdapterFolder, base: str | None = None) -> tuple[str, str | None]:
    """Return the folder or hub id of an adapter's base, and its revision.

    Args:
        adapter: the adapter.
        base: a folder or hub id to use instead of the recorded one.

    Raises:
        ConfigError: No base is given, and the adapter records none.
    """
    name = base or adapter.base
    if not name:
        raise ConfigError(
            f"--base: is required, since {adapter.parts[0] / CONFIG} names no base model; set its"
            " folder or hub id"
        )
    local = name.startswith("package:") or Path(name).expanduser().is_dir()
    return name, None if base or local else adapter.config.get("revision")


def request_of(
    adapter: AdapterFolder,
    *,
    task: str | None = None,
    pooling: str | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> ModelRequest:
    """Return the request of an adapter's base.

    Args:
        adapter: the adapter.
        task: task, if the adapter does not record it.
        pooling: the sequence classifier's input; None for the adapter's.
        vocab_size: number of tokens with added ones; None for the adapter's.
        **options: further fields of `ModelRequest`.

    Raises:
        ConfigError: The task is unknown, or is not the adapter's.
    """
    found: Any = _task(adapter, task)
    return ModelRequest(
        found,
        _labels(adapter, found),
        pooling=pooling or adapter.settings.pooling,
        vocab_size=vocab_size or adapter.settings.vocab_size or _rows(adapter, _EMBEDDING),
        **options,
    )


def _task(adapter: AdapterFolder, asked: str | None) -> str:
    tasks = {peft: task for task, peft in peft_config.TASK_TYPES.items()}
    kind = adapter.config.get("task_type")
    if kind is not None and kind not in tasks:
        raise ConfigError(
            f"{adapter.parts[0] / CONFIG}: task_type {kind!r} is not supported (supported:"
            f" {', '.join(tasks)})"
        )
    recorded = adapter.settings.task or (tasks[kind] if kind else None)
    if asked and recorded and asked != recorded:
        raise ConfigError(
            f"--task: is {asked}, but the adapter was trained for {recorded}; omit it"
        )
    if not (asked or recorded):
        raise ConfigError(
            f"--task: is required, since {adapter.parts[0] / CONFIG} has no task_type; use one of"
            f" {', '.join(tasks.values())}"
        )
    return str(asked or recorded)


def _labels(adapter: AdapterFolder, task: str) -> int | None:
    """Return the number of labels in the adapter's settings or head; None for the base's."""
    if adapter.settings.task or "classification" not in task:
        return adapter.settings.num_labels
    return _rows(adapter, _HEAD)


def _rows(adapter: AdapterFolder, which: re.Pattern[str]) -> int | None:
    """Return the number of rows of a tensor of the adapter; None if it does not exist."""
    header = read_header(adapter.parts[0] / layout_of(adapter.parts[0]).weights)
    found = [
        tensor.shape[0] for name, tensor in header.items() if which.search(name) and tensor.shape
    ]
    return found[0] if found else None
