"""The request of an export, the adapter's metadata, and the checks before weights are read."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from jaxpeft.core.folding import can_fold
from jaxpeft.errors import AdapterError, ConfigError, WeightsError
from jaxpeft.hub import loading
from jaxpeft.hub.adapters import peft_config
from jaxpeft.hub.adapters.extra import read_extra
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA
from jaxpeft.hub.adapters.layouts import LAYOUTS
from jaxpeft.hub.adapters.load import layout_of, parts_of
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.loading import Outline
from jaxpeft.hub.merge_record import MERGE, records
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.sources import file_sha256, package_of
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.hub.weights.safetensors_writing import SHARD_BYTES
from jaxpeft.json_files import read_json
from jaxpeft.methods import METHODS
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import Quant, read_quant

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
    r"\.(?:embed_tokens|word_embeddings)"
    r"(?:\.modules_to_save(?:\.default)?|(?:\.token_adapter)?\.base_layer)?\.weight$"
)
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """The request of an export.

    Attributes:
        adapter: folder of the adapter.
        to: `peft`, `merged` or `merged_quantized_reference`.
        out: output folder, which must not exist or be empty.
        base: folder or hub id of the base; None for the one recorded in the adapter.
        dtype: dtype of merged weights; None for the dtypes of the base.
        task: task, if the adapter does not record it.
        pooling: the sequence classifier's input; None for the adapter's.
        vocab_size: number of tokens with added ones; None for the adapter's.
        allow_base: whether to accept a different base than the adapter was trained on.
        shard_bytes: maximum size of the tensors in a file of merged weights.
    """

    adapter: Path
    to: str
    out: Path
    base: str | None = None
    dtype: str | None = None
    task: str | None = None
    pooling: str | None = None
    vocab_size: int | None = None
    allow_base: bool = False
    shard_bytes: int = SHARD_BYTES


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
    """Read the metadata of an adapter folder, without its tensors.

    Raises:
        AdapterError: It is not an adapter folder, or one of its files is missing or a pickle.
    """
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    try:
        parts = parts_of(folder)
        for part in parts:
            layout_of(part)
        settings = parse_settings(read_extra(parts[0]), parts[0] / EXTRA)
        return AdapterFolder(folder, parts, read_json(parts[0] / CONFIG), settings)
    except WeightsError as error:
        raise AdapterError(error.problems) from error


def require_free(out: Path) -> None:
    """Raise an error if the output folder is not empty.

    Raises:
        ConfigError: It is not empty, or is a file.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: is not empty; choose a new folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; choose a new folder")


def quant_of(request: ExportRequest, adapter: AdapterFolder, outline: Outline) -> Quant | None:
    """Return the quantization to which the base is rounded, or None if it is not rounded.

    A base that is already quantized in its files is not rounded again.

    Raises:
        ConfigError: Rounding is requested, but the adapter's base was not quantized, or its
            quantization is unknown to this version.
    """
    if outline.plan.held:
        return None
    recorded = adapter.settings.quant
    quant = None if recorded is None else read_quant(recorded, adapter.folder / EXTRA)
    if request.to == "merged_quantized_reference" and quant is None:
        raise ConfigError(
            f"--to {request.to}: {adapter.folder} was trained on an unquantized base ({EXTRA} has"
            " no quant), so there is nothing to round; use --to merged"
        )
    if request.to == "merged" and quant is not None:
        _log.warning(
            "the adapter was trained on a base quantized to %s, but is merged into the unquantized"
            " one; use --to merged_quantized_reference to merge into the weights it was trained on",
            quant.form,
        )
    return quant if request.to == "merged_quantized_reference" else None


def outline_of(request: ExportRequest, adapter: AdapterFolder) -> Outline:
    """Return the outline of the base, with float32 activations so that only weights are rounded.

    Raises:
        ConfigError: The base or the task is unknown.
        WeightsError: The base cannot be used.
    """
    where, name = adapter.parts[0] / CONFIG, request.base or adapter.base
    if not name:
        raise ConfigError(
            f"--base: is required, since {where} names no base model; set its folder or hub id"
        )
    local = name.startswith("package:") or Path(name).expanduser().is_dir()
    revision = None if request.base or local else adapter.config.get("revision")
    task: Any = _task(request, adapter)
    try:
        model_request = ModelRequest(
            task,
            _labels(adapter, task),
            compute_dtype=jnp.float32,
            pooling=request.pooling or adapter.settings.pooling,
            vocab_size=request.vocab_size
            or adapter.settings.vocab_size
            or _rows(adapter, _EMBEDDING),
        )
        return loading.outline(name, model_request, revision)
    except WeightsError as error:
        hint = () if request.base else (f"this base is named in {where}; set its path with --base",)
        raise WeightsError([*error.problems, *hint]) from error


def _task(request: ExportRequest, adapter: AdapterFolder) -> str:
    tasks = {peft: task for task, peft in peft_config.TASK_TYPES.items()}
    kind = adapter.config.get("task_type")
    if kind is not None and kind not in tasks:
        raise ConfigError(
            f"{adapter.parts[0] / CONFIG}: task_type {kind!r} is not supported (supported:"
            f" {', '.join(tasks)})"
        )
    recorded = adapter.settings.task or (tasks[kind] if kind else None)
    if request.task and recorded and request.task != recorded:
        raise ConfigError(
            f"--task: is {request.task}, but the adapter was trained for {recorded}; omit it"
        )
    if not (request.task or recorded):
        raise ConfigError(
            f"--task: is required, since {adapter.parts[0] / CONFIG} has no task_type; use one of"
            f" {', '.join(tasks.values())}"
        )
    return str(request.task or recorded)


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


def require_mergeable(adapter: AdapterFolder) -> None:
    """Raise an error if the adapter's method cannot be merged.

    Raises:
        ConfigError: It cannot be merged; the message names the method and an alternative.
    """
    for part in adapter.parts:
        kind = peft_config.method_of(read_json(part / CONFIG))
        if kind is None and layout_of(part) is not LAYOUTS["peft"]:
            kind = next(
                one for one in METHODS.values() if LAYOUTS[one.peft.layout] is layout_of(part)
            )
        if kind is not None and not can_fold(kind):
            raise ConfigError(
                f"{part}: {kind.name} cannot be merged: its computation cannot be expressed by"
                " plain weights; keep the adapter separate with --to peft"
            )


def reads_elsewhere(model: Pretrained) -> bool:
    """Return whether a classifier pools differently than `transformers`."""
    return model.options.task == "sequence_classification" and model.options.pooling not in (
        None,
        model.config.own_pooling,
    )


def require_same_elsewhere(request: ExportRequest, outline: Outline) -> None:
    """Raise an error if `transformers` would compute different logits with the merged model.

    Raises:
        ConfigError: The pooling differs; the message names both and an alternative.
    """
    model = outline.model
    if reads_elsewhere(model):
        how, own, kind = (
            model.options.pooling,
            model.config.own_pooling,
            outline.config["model_type"],
        )
        raise ConfigError(
            f"--to {request.to}: the classifier uses pooling={how!r}, but transformers uses"
            f" {own!r} for {kind}, so its labels would differ; use --to peft, and load the folder"
            f" with jaxpeft.load(..., pooling={how!r}) and jaxpeft.load_adapter, or train with"
            f" model.pooling={own!r}"
        )


def require_unmerged(adapter: AdapterFolder, outline: Outline) -> None:
    """Raise an error if the adapter is already merged into the base, and log if the base is not
    known to be the adapter's.

    Raises:
        AdapterError: It is already merged.
    """
    folder = outline.model.source.folder
    for record in records(folder):
        if record.get("adapter", {}).get("sha256") == adapter.sha256:
            raise AdapterError(
                f"{folder}: according to {MERGE}, this adapter is already merged into it; use the"
                " base that it was trained on"
            )
    if not adapter.settings.base_sha256:
        _log.warning(
            "%s: has no base_sha256, so whether %s is its base is not checked",
            adapter.folder,
            folder,
        )
