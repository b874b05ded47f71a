"""What an export is asked for, what the adapter says of itself, and what is refused before a weight
is read.
"""

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
from jaxpeft.hub.adapters.folders import LAYOUTS, layout_of, parts_of
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
    """What is to be exported, and how.

    Attributes:
        adapter: folder of the adapter.
        to: `peft`, `merged` or `merged_quantized_reference`.
        out: the folder to write; it must not be there, or be empty.
        base: folder or hub id of the base; None for the one that the adapter names.
        dtype: of merged weights; None for that of each of the base's.
        task: of an adapter that says none.
        pooling: what a sequence classifier reads; None for what the adapter says.
        vocab_size: of a base that tokens were added to; None for what the adapter says.
        allow_base: whether the base may be another one than the adapter was trained on.
        shard_bytes: the most bytes of tensors in a file of merged weights.
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
    """What an adapter folder says of itself.

    Attributes:
        folder: of the adapter.
        parts: the folders of the methods that it is made of; itself, if it is of one.
        config: `adapter_config.json`, of the first.
        settings: of the run, of the first; empty where the adapter is not jaxpeft's.
    """

    folder: Path
    parts: tuple[Path, ...]
    config: Mapping[str, Any]
    settings: Settings

    @property
    def base(self) -> str:
        """Name of its base, empty where it says none; `package:NAME` for the folder that a package
        holds.
        """
        name = str(
            self.config.get("base_model_name_or_path") or self.config.get("model_name") or ""
        )
        return package_of(name) or name

    @property
    def sha256(self) -> str:
        """Its identity: its numbers and options, not what its base is called."""
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
    """Read what an adapter folder says of itself; no tensor is read.

    Raises:
        AdapterError: it is no adapter folder, or a file of it is missing or a pickle.
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
    """Refuse a folder that holds something.

    Raises:
        ConfigError: naming it.
    """
    if out.is_dir() and any(out.iterdir()):
        raise ConfigError(f"--out {out}: is not empty; give a new folder")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; give a new folder")


def quant_of(request: ExportRequest, adapter: AdapterFolder, outline: Outline) -> Quant | None:
    """Return how the base is to be rounded: as the one that the adapter was trained on, if that is
    asked for; None for not at all.

    A base that is quantized in its files is not rounded again.

    Raises:
        ConfigError: it is asked for, and there is none; or it is not of this version.
    """
    if outline.plan.held:
        return None
    recorded = adapter.settings.quant
    quant = None if recorded is None else read_quant(recorded, adapter.folder / EXTRA)
    if request.to == "merged_quantized_reference" and quant is None:
        raise ConfigError(
            f"--to {request.to}: {adapter.folder} was trained on a base that is not quantized"
            f" ({EXTRA} names no quant), so there is nothing to round; use --to merged"
        )
    if request.to == "merged" and quant is not None:
        _log.warning(
            "the adapter was trained on a base rounded to %s, and is merged into the one that is"
            " not rounded; --to merged_quantized_reference gives what it was trained with",
            quant.form,
        )
    return quant if request.to == "merged_quantized_reference" else None


def outline_of(request: ExportRequest, adapter: AdapterFolder) -> Outline:
    """Find the base, and everything about it but its numbers; activations are float32, so that
    weights alone differ.

    Raises:
        ConfigError: neither the request nor the adapter says base or task.
        WeightsError: the base cannot be used.
    """
    where, named = adapter.parts[0] / CONFIG, request.base or adapter.base
    if not named:
        raise ConfigError(
            f"--base: is not given, and {where} names no base model; give its folder or hub id"
        )
    local = named.startswith("package:") or Path(named).expanduser().is_dir()
    revision = None if request.base or local else adapter.config.get("revision")
    task: Any = _task(request, adapter)
    try:
        asked = ModelRequest(
            task,
            _labels(adapter, task),
            compute_dtype=jnp.float32,
            pooling=request.pooling or adapter.settings.pooling,
            vocab_size=request.vocab_size
            or adapter.settings.vocab_size
            or _rows(adapter, _EMBEDDING),
        )
        return loading.outline(named, asked, revision)
    except WeightsError as error:
        told = (
            ()
            if request.base
            else (f"this is the base that {where} names; --base gives another place for it",)
        )
        raise WeightsError([*error.problems, *told]) from error


def _task(request: ExportRequest, adapter: AdapterFolder) -> str:
    tasks = {peft: task for task, peft in peft_config.TASK_TYPES.items()}
    kind = adapter.config.get("task_type")
    if kind is not None and kind not in tasks:
        raise ConfigError(
            f"{adapter.parts[0] / CONFIG}: task_type {kind!r} is not supported (supported:"
            f" {', '.join(tasks)})"
        )
    said = adapter.settings.task or (tasks[kind] if kind else None)
    if request.task and said and request.task != said:
        raise ConfigError(
            f"--task: is {request.task}, the adapter was trained for {said}; leave it out"
        )
    if not (request.task or said):
        raise ConfigError(
            f"--task: is not given, and {adapter.parts[0] / CONFIG} names no task_type; give one of"
            f" {', '.join(tasks.values())}"
        )
    return str(request.task or said)


def _labels(adapter: AdapterFolder, task: str) -> int | None:
    """Return the number of labels that the adapter says, or that its head has; None for what the
    base says.
    """
    if adapter.settings.task or "classification" not in task:
        return adapter.settings.num_labels
    return _rows(adapter, _HEAD)


def _rows(adapter: AdapterFolder, which: re.Pattern[str]) -> int | None:
    """Return the number of rows of a tensor of the adapter, None where it holds no such tensor."""
    header = read_header(adapter.parts[0] / layout_of(adapter.parts[0]).weights)
    found = [
        tensor.shape[0] for name, tensor in header.items() if which.search(name) and tensor.shape
    ]
    return found[0] if found else None


def require_mergeable(adapter: AdapterFolder) -> None:
    """Refuse what cannot be merged before a weight is read.

    Raises:
        ConfigError: saying which method it is, and what to do.
    """
    for part in adapter.parts:
        kind = peft_config.method_of(read_json(part / CONFIG))
        if kind is None and layout_of(part) is not LAYOUTS["peft"]:
            kind = next(
                one for one in METHODS.values() if LAYOUTS[one.peft.layout] is layout_of(part)
            )
        if kind is not None and not can_fold(kind):
            raise ConfigError(
                f"{part}: {kind.name} cannot be merged: no plain weights compute what it does; keep"
                " the adapter beside its base, as --to peft writes it"
            )


def reads_elsewhere(model: Pretrained) -> bool:
    """Return whether a classifier reads what that of `transformers` does not."""
    return model.options.task == "sequence_classification" and model.options.pooling not in (
        None,
        model.config.own_pooling,
    )


def require_same_elsewhere(request: ExportRequest, outline: Outline) -> None:
    """Refuse a whole model that `transformers` would compute other logits with.

    Raises:
        ConfigError: saying what the classifier reads, and what works.
    """
    model = outline.model
    if reads_elsewhere(model):
        how, own, kind = (
            model.options.pooling,
            model.config.own_pooling,
            outline.config["model_type"],
        )
        raise ConfigError(
            f"--to {request.to}: the classifier reads pooling={how!r}, and that of transformers"
            f" reads {own!r} of a {kind}: from the same weights it would compute other labels; use"
            f" --to peft, whose folder jaxpeft.load(..., pooling={how!r}) and jaxpeft.load_adapter"
            f" compute, or train with model.pooling={own!r}"
        )


def require_unmerged(adapter: AdapterFolder, outline: Outline) -> None:
    """Refuse a base that the adapter is merged into already, and say where the base is not known to
    be the adapter's.

    Raises:
        AdapterError: naming the base.
    """
    folder = outline.model.source.folder
    for record in records(folder):
        if record.get("adapter", {}).get("sha256") == adapter.sha256:
            raise AdapterError(
                f"{folder}: {MERGE} says that this adapter is merged into it already; give the base"
                " that it was trained on"
            )
    if not adapter.settings.base_sha256:
        _log.warning(
            "%s: says no base_sha256; that %s is its base is not checked", adapter.folder, folder
        )
