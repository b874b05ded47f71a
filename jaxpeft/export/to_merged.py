"""`--to merged` and `--to merged_quantized_reference`: a model folder for `transformers`, with the
adapter merged into its base.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.paths import Tree
from jaxpeft.export import merged_model
from jaxpeft.export.export_job import Job, Report, Target, size_of
from jaxpeft.export.probe import ROWS, TOLERANCE, gap_of, logits, require_equal
from jaxpeft.export.request import (
    ExportRequest,
    quant_of,
    require_mergeable,
    require_same_elsewhere,
    require_unmerged,
    warn_unrounded,
)
from jaxpeft.hub import loading
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder
from jaxpeft.hub.base_identity import fingerprint
from jaxpeft.hub.loading import Outline
from jaxpeft.hub.merge_record import MERGE, records
from jaxpeft.hub.weights import digests
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import dequantize

WARN_ABOVE = 0.01
"""The relative error of a merge above which a warning is logged."""
_log = logging.getLogger(__name__)


def _require(request: ExportRequest, adapter: AdapterFolder, outline: Outline) -> None:
    quant_of(request, adapter, outline)
    warn_unrounded(request, adapter, outline)
    require_mergeable(adapter)
    require_same_elsewhere(request, outline)
    require_unmerged(adapter, outline)


def _export(job: Job, folder: Path) -> Report:
    request, outline = job.request, job.outline
    quant = quant_of(request, job.adapter, outline)
    # dequantizing the base's files to float32 is exact
    params = dequantize(job.params) if outline.plan.held else dict(job.params)
    job.base.clear()  # only the tree references its leaves now, and frees them one by one
    job.params.clear()
    dtype = None if request.dtype is None else jnp.dtype(request.dtype)
    if quant is not None:
        merged_model.round_to_quantized(params, quant)
    wanted = logits(outline.model, params, job.method)
    model = merged_model.untie_head(job.method, outline.model, params)
    error = merged_model.fold(job.method, params, outline, dtype)
    own = merged_model.dtype_of(outline, dtype)
    merged = logits(model, params)
    gap = gap_of(merged, wanted)
    if all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params)):
        require_equal(gap, wanted, TOLERANCE, "the merged weights, compared with the adapter")
    _warn(error, own)
    record = {
        "dtype": own.name,
        "relative_error": error,
        "largest_logit_difference": gap,
        "base_rounded_to": outline.plan.form or (quant and quant.form),
    }
    files = _write(job, model, params, folder, _record(job) | record)
    params.clear()
    _require_same(model, folder, merged, f"{request.out}: the merged model, loaded again")
    summary = f"{outline.config['model_type']} with {job.method.name} merged, {own.name}"
    lines = (
        f"wrote {request.out}: {summary}, {size_of(folder, files)}",
        f"error of the merge: {error:.2g} of the adapter's change to the weights",
        (
            f"largest logit difference from the unmerged adapter: {gap:.2g} ({ROWS} rows of random"
            " tokens)"
        ),
        _usage(request.out, model),
    )
    return Report(lines, gap, error)


def _write(
    job: Job, model: Pretrained, params: Tree, folder: Path, record: Mapping[str, Any]
) -> list[str]:
    """Write the folder of a merged model, and return the names of its weight files."""
    request, outline, settings = job.request, job.outline, job.adapter.settings
    dtype = None if request.dtype is None else jnp.dtype(request.dtype)
    own = merged_model.dtype_of(outline, dtype)
    kept = not any(paths.is_head(path) for path in outline.plan.new)
    config = merged_model.config_of(model, outline.config, settings, kept, own)
    written: dict[str, str] = {}
    tensors = {
        name: digests.RecordedTensor(name, tensor, written)
        for name, tensor in merged_model.tensors_of(model, params, dtype).items()
    }
    files = merged_model.write(folder, tensors, config, request.shard_bytes)
    merged_model.copy_files(model.source.folder, job.adapter.folder, folder, settings)
    (folder / MERGE).write_text(json.dumps({**record, "sha256": written}, indent=2) + "\n")
    return files


def _require_same(model: Pretrained, folder: Path, merged: Any, what: str) -> None:
    """Raise an error if a written model does not compute the logits of the merged one.

    Raises:
        ExportError: It does not.
    """
    task: Any = model.options.task
    again, loaded = loading.load(
        folder, task=task, pooling=model.options.pooling, compute_dtype=jnp.float32
    )
    require_equal(gap_of(logits(again, loaded), merged), merged, TOLERANCE / 10, what)


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


def _record(job: Job) -> dict[str, Any]:
    """Return the record of this merge, which includes earlier merges of the base."""
    source = job.outline.model.source
    return {
        "jaxpeft_version": jaxpeft.__version__,
        "adapter": {
            "path": str(job.adapter.folder),
            "sha256": job.adapter.sha256,
            "method": job.method.as_dict(),
        },
        "base": {"name": source.name, "revision": source.revision, "sha256": fingerprint(source)},
        "task": job.outline.model.options.task,
        "earlier": [
            {key: value for key, value in one.items() if key != "sha256"}
            for one in records(source.folder)
        ],
    }


MERGED = Target("every method that plain weights can express", _require, _export)
MERGED_REFERENCE = Target(
    "the same, of an adapter that was trained on a quantized base", _require, _export
)
