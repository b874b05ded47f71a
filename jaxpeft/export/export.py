"""Exporting an adapter as a folder for `peft`, or as a merged model for `transformers`.

The result is loaded again and its logits are compared before the folder gets its final name, so a
folder that exists is complete.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft
from jaxpeft import atomic
from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError
from jaxpeft.export import merged_model
from jaxpeft.export.probe import ROWS, TOLERANCE, gap_of, logits, require_equal
from jaxpeft.export.request import (
    ExportRequest,
    outline_of,
    quant_of,
    reads_elsewhere,
    require_free,
    require_mergeable,
    require_same_elsewhere,
    require_unmerged,
)
from jaxpeft.hub import loading
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder, read_adapter
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.adapters.layouts import LAYOUTS
from jaxpeft.hub.adapters.load import check_base, load_adapter
from jaxpeft.hub.adapters.save import save_adapter
from jaxpeft.hub.base_identity import fingerprint
from jaxpeft.hub.loading import Outline
from jaxpeft.hub.merge_record import MERGE, records
from jaxpeft.hub.weights import digests
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import Quant, dequantize

WARN_ABOVE = 0.01
"""The relative error of a merge above which a warning is logged."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """The result of an export.

    Attributes:
        lines: text for the terminal: the output, its size, the errors, how to load it.
        gap: largest difference of logits on the probe batch.
        error: error of a merge, `||merged - exact|| / ||exact - base||` over all changed weights.
    """

    lines: tuple[str, ...]
    gap: float
    error: float | None = None


@dataclass(frozen=True)
class _Work:
    """The input of an export: an adapter loaded into its base."""

    request: ExportRequest
    adapter: AdapterFolder
    outline: Outline
    method: Method
    params: Tree


def export(request: ExportRequest) -> Report:
    """Export an adapter.

    Raises:
        ConfigError: The folder is not empty, the task is unknown, or the method cannot be merged.
        AdapterError: The adapter is invalid, belongs to another base, or is already merged into
            this one.
        WeightsError: The base cannot be used.
        ExportError: The logits of the exported model differ; no files remain.
    """
    require_free(request.out)
    adapter = read_adapter(request.adapter)
    outline = outline_of(request, adapter)
    quant = quant_of(request, adapter, outline)
    if request.to != "peft":
        require_mergeable(adapter)
        require_same_elsewhere(request, outline)
        require_unmerged(adapter, outline)
    for part in adapter.parts:
        check_base(part, read_json(part / CONFIG), outline.model, allow_base=request.allow_base)
    with _work_folder(request.out) as folder:
        base = outline.read()
        method, params = load_adapter(
            request.adapter, outline.model, base, allow_base=request.allow_base
        )
        work = _Work(request, adapter, outline, method, params)
        if request.to == "peft":
            return _to_peft(work, folder, base)
        if outline.plan.held:  # dequantizing the base's files to float32 is exact
            work = dataclasses.replace(work, params=dequantize(params))
            del params
        del base  # only the tree references its leaves now, and frees them one by one
        return _to_merged(work, folder, quant)


@contextmanager
def _work_folder(out: Path) -> Generator[Path]:
    """Yield a temporary folder that is renamed to `out` on success, and removed on failure."""
    target = out.resolve()
    with atomic.replace_when_done(target, unique=True) as temporary:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
        except OSError as error:
            raise ConfigError(
                f"--out {out}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        yield temporary


def _to_peft(work: _Work, folder: Path, base: Tree) -> Report:
    model, source = work.outline.model, work.outline.model.source
    wanted = logits(model, work.params, work.method)
    if work.adapter.base:  # keep the base's recorded name rather than its local path
        source = dataclasses.replace(
            source, name=work.adapter.base, revision=work.adapter.config.get("revision")
        )
    save_adapter(
        folder, work.method, work.params, model.clone(source=source), settings=work.adapter.settings
    )
    merged_model.copy_files(None, work.adapter.folder, folder, work.adapter.settings)
    again, loaded = load_adapter(folder, model, base)
    gap = gap_of(logits(model, loaded, again), wanted)
    require_equal(gap, wanted, TOLERANCE, f"{work.request.out}: the exported adapter, loaded again")
    weights = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.safetensors"))]
    lines = (
        f"wrote {work.request.out}: {work.method.name} adapter, {_size(folder, weights)}",
        f"largest logit difference after loading: {gap:.2g} ({ROWS} rows of random tokens)",
        _adapter_usage(work.request.out, work.method, model),
    )
    return Report(lines, gap)


def _adapter_usage(out: Path, method: Method, model: Pretrained) -> str:
    here = f"jaxpeft.load_adapter({str(out)!r}, model, params)"
    if reads_elsewhere(model):
        how = f"with jaxpeft.load(..., pooling={model.options.pooling!r})"
        return (
            f"load it: {here} {how}; other libraries' classifiers use pooling"
            f" {model.config.own_pooling!r}"
        )
    parts = [part for part in method.parts() if part.peft.type or part.peft.layout != "peft"]
    if not parts:
        return f"load it: {here}; other libraries do not support {method.name}"
    if len(method.parts()) > 1:
        return f"load it: {here}; other libraries load its folders one by one"
    library = LAYOUTS[method.peft.layout]
    elsewhere = (
        f"peft.PeftModel.from_pretrained(base_model, {str(out)!r})"
        if library.name == "peft"
        else library.library
    )
    return f"load it: {elsewhere} or {here}"


def _to_merged(work: _Work, folder: Path, quant: Quant | None) -> Report:
    request, adapter, outline, method, params = (
        work.request,
        work.adapter,
        work.outline,
        work.method,
        work.params,
    )
    dtype = None if request.dtype is None else jnp.dtype(request.dtype)
    if quant is not None:
        merged_model.round_to_quantized(params, quant)
    wanted = logits(outline.model, params, method)
    model = merged_model.untie_head(method, outline.model, params)
    error = merged_model.fold(method, params, outline, dtype)
    own = merged_model.dtype_of(outline, dtype)
    merged = logits(model, params)
    gap = gap_of(merged, wanted)
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        require_equal(gap, wanted, TOLERANCE, "the merged weights, compared with the adapter")
    _warn(error, own)
    kept = not any(paths.is_head(path) for path in outline.plan.new)
    config = merged_model.config_of(model, outline.config, adapter.settings, kept, own)
    written: dict[str, str] = {}
    tensors = {
        name: digests.RecordedTensor(name, tensor, written)
        for name, tensor in merged_model.tensors_of(model, params, dtype).items()
    }
    files = merged_model.write(folder, tensors, config, request.shard_bytes)
    merged_model.copy_files(model.source.folder, adapter.folder, folder, adapter.settings)
    record = {
        "dtype": own.name,
        "relative_error": error,
        "largest_logit_difference": gap,
        "base_rounded_to": "nf4" if outline.plan.held else quant and quant.form,
        "sha256": written,
    }
    (folder / MERGE).write_text(json.dumps(_record(work) | record, indent=2) + "\n")
    params.clear()
    task: Any = model.options.task
    again, loaded = loading.load(
        folder, task=task, pooling=model.options.pooling, compute_dtype=jnp.float32
    )
    found = logits(again, loaded)
    require_equal(
        gap_of(found, merged),
        merged,
        TOLERANCE / 10,
        f"{request.out}: the merged model, loaded again",
    )
    summary = f"{outline.config['model_type']} with {method.name} merged, {own.name}"
    lines = (
        f"wrote {request.out}: {summary}, {_size(folder, files)}",
        f"error of the merge: {error:.2g} of the adapter's change to the weights",
        (
            f"largest logit difference from the unmerged adapter: {gap:.2g} ({ROWS} rows of random"
            " tokens)"
        ),
        _usage(request.out, model),
    )
    return Report(lines, gap, error)


def _usage(out: Path, model: Pretrained) -> str:
    cls = f"transformers.AutoModel{merged_model.HEADS[model.options.task]}"
    elsewhere = f"{cls}.from_pretrained({str(out)!r})"
    return f"load it: {elsewhere} or jaxpeft.load({str(out)!r}, task={model.options.task!r})"


def _warn(error: float, dtype: Any) -> None:
    if error > WARN_ABOVE:
        _log.warning(
            "%s rounds off %.1f %% of the adapter's change to the weights; use --dtype float32, or"
            " keep the adapter separate",
            dtype.name,
            100 * error,
        )


def _record(work: _Work) -> dict[str, Any]:
    """Return the record of this merge, which includes earlier merges of the base."""
    source = work.outline.model.source
    return {
        "jaxpeft_version": jaxpeft.__version__,
        "adapter": {
            "path": str(work.adapter.folder),
            "sha256": work.adapter.sha256,
            "method": work.method.as_dict(),
        },
        "base": {"name": source.name, "revision": source.revision, "sha256": fingerprint(source)},
        "task": work.outline.model.options.task,
        "earlier": [
            {key: value for key, value in one.items() if key != "sha256"}
            for one in records(source.folder)
        ],
    }


def _size(folder: Path, weights: list[str]) -> str:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    unit = next(((n, name) for n, name in ((1e9, "GB"), (1e6, "MB")) if size >= n), (1e3, "kB"))
    return f"{size / unit[0]:.1f} {unit[1]}, weights in {', '.join(weights)}"
