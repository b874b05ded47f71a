"""The request of an export, and the checks before weights are read."""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp

from jaxpeft.command.output_paths import folder_problem
from jaxpeft.core.folding import can_fold
from jaxpeft.core.method import Method
from jaxpeft.errors import AdapterError, ConfigError, WeightsError
from jaxpeft.hub import loading
from jaxpeft.hub.adapters import peft_config
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder, base_of, request_of
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA
from jaxpeft.hub.adapters.layouts import LAYOUTS
from jaxpeft.hub.adapters.load import layout_of
from jaxpeft.hub.loading import Outline
from jaxpeft.hub.merge_record import MERGE, records
from jaxpeft.hub.weights.safetensors_writing import SHARD_BYTES
from jaxpeft.json_files import read_json
from jaxpeft.methods import METHODS
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import Quant, read_quant

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """The request of an export.

    Attributes:
        adapter: folder of the adapter.
        to: output format, one of `jaxpeft.export.export_targets.TARGETS`.
        out: output folder, which must not exist or be empty.
        base: folder or hub id of the base; None for the one recorded in the adapter.
        dtype: dtype of merged weights; None for the dtypes of the base.
        task: task, if the adapter does not record it.
        pooling: the sequence classifier's input; None for the adapter's.
        vocab_size: number of tokens with added ones; None for the adapter's.
        allow_base: whether to accept a different base than the adapter was trained on.
        allow_no_op: whether to export an adapter that does not change the base's outputs.
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
    allow_no_op: bool = False
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class VerifyRequest:
    """The request to verify a server.

    Attributes:
        adapter: folder of the adapter.
        base: folder or hub id of the base; None for the one recorded in the adapter.
        task: task, if the adapter does not record it.
        vocab_size: number of tokens with added ones; None for the adapter's.
        allow_base: whether to accept a different base than the adapter was trained on.
    """

    pooling: ClassVar[None] = None  # a language model has none

    adapter: Path
    base: str | None = None
    task: str | None = None
    vocab_size: int | None = None
    allow_base: bool = False


def require_free(out: Path) -> None:
    """Raise an error if the output folder is not empty.

    Raises:
        ConfigError: It is not empty, is a file, or cannot be written.
    """
    if problem := folder_problem("--output", str(out), is_new=True):
        raise ConfigError(problem)


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
    return quant if request.to == "merged_quantized_reference" else None


def warn_unrounded(request: ExportRequest, adapter: AdapterFolder, outline: Outline) -> None:
    """Log if an adapter of a quantized base is merged into the unquantized one."""
    recorded = adapter.settings.quant
    if request.to == "merged" and recorded is not None and not outline.plan.held:
        _log.warning(
            "the adapter was trained on a base quantized to %s, but is merged into the unquantized"
            " one; use --to merged_quantized_reference to merge into the weights it was trained on",
            read_quant(recorded, adapter.folder / EXTRA).form,
        )


def outline_of(request: ExportRequest | VerifyRequest, adapter: AdapterFolder) -> Outline:
    """Return the outline of the base, with float32 activations so that only weights are rounded.

    Raises:
        ConfigError: The base or the task is unknown.
        WeightsError: The base cannot be used.
    """
    name, revision = base_of(adapter, request.base)
    model_request = request_of(
        adapter,
        task=request.task,
        pooling=request.pooling,
        vocab_size=request.vocab_size,
        compute_dtype=jnp.float32,
    )
    try:
        return loading.outline(name, model_request, revision)
    except WeightsError as error:
        where = adapter.parts[0] / CONFIG
        hint = () if request.base else (f"this base is named in {where}; set its path with --base",)
        raise WeightsError([*error.problems, *hint]) from error


def kind_of(part: Path) -> type[Method] | None:
    """Return the method of a part of an adapter; None if its files name none that is known."""
    kind = peft_config.method_of(read_json(part / CONFIG))
    if kind is None and layout_of(part) is not LAYOUTS["peft"]:
        return next(one for one in METHODS.values() if LAYOUTS[one.peft.layout] is layout_of(part))
    return kind


def kinds_of(adapter: AdapterFolder) -> list[type[Method]]:
    """Return the methods of an adapter, as far as its files name known ones."""
    return [kind for part in adapter.parts if (kind := kind_of(part)) is not None]


def require_mergeable(adapter: AdapterFolder) -> None:
    """Raise an error if the adapter's method cannot be merged.

    Raises:
        ConfigError: It cannot be merged; the message names the method and an alternative.
    """
    for part in adapter.parts:
        kind = kind_of(part)
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
            f" {own!r} for {kind}, so its labels would differ;"
            f" {with_jaxpeft(request.adapter, model, request.pooling)}, or train with"
            f" model.pooling={own!r}"
        )


def with_jaxpeft(adapter: Path, model: Pretrained, pooling: str | None = None) -> str:
    """Return how to use an adapter that no other library computes equally.

    Args:
        adapter: folder of the adapter.
        model: the model.
        pooling: the pooling, if the adapter does not record it.
    """
    if pooling is not None:
        return "use --to peft, which records the pooling, and load the folder with jaxpeft"
    command = shlex.join(
        ["python", "-m", "jaxpeft.generate", "--adapter", str(adapter), "--input", "FILE"]
    )
    return (
        f"use it with jaxpeft: `{command}`, or in Python"
        f" jaxpeft.load(..., pooling={model.options.pooling!r}) and jaxpeft.load_adapter"
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
