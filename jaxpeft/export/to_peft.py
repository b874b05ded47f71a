"""`--to peft`: an adapter folder for `peft`, or for the method's own library."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from jaxpeft.core.method import Method
from jaxpeft.export import merged_model
from jaxpeft.export.export_job import Job, Report, Target, size_of
from jaxpeft.export.probe import ROWS, TOLERANCE, gap_of, logits, require_equal
from jaxpeft.export.request import ExportRequest, reads_elsewhere, with_jaxpeft
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder
from jaxpeft.hub.adapters.layouts import LAYOUTS
from jaxpeft.hub.adapters.load import load_adapter
from jaxpeft.hub.adapters.save import save_adapter
from jaxpeft.hub.loading import Outline
from jaxpeft.models.base import Pretrained


def model_with_name(job: Job) -> Pretrained:
    """Return the base with the name that the adapter records, in place of its local path."""
    model = job.outline.model
    if not job.adapter.base:
        return model
    source = dataclasses.replace(
        model.source, name=job.adapter.base, revision=job.adapter.config.get("revision")
    )
    return model.clone(source=source)


def _require(request: ExportRequest, adapter: AdapterFolder, outline: Outline) -> None:
    """Accept every adapter: the format holds all methods."""
    del request, adapter, outline


def _export(job: Job, folder: Path) -> Report:
    model, out = job.outline.model, job.request.out
    wanted = logits(model, job.params, job.method)
    save_adapter(
        folder, job.method, job.params, model_with_name(job), settings=job.adapter.settings
    )
    merged_model.copy_files(None, job.adapter.folder, folder, job.adapter.settings)
    again, loaded = load_adapter(folder, model, job.base)
    gap = gap_of(logits(model, loaded, again), wanted)
    require_equal(gap, wanted, TOLERANCE, f"{out}: the exported adapter, loaded again")
    weights = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*.safetensors"))]
    lines = (
        f"wrote {out}: {job.method.name} adapter, {size_of(folder, weights)}",
        f"largest logit difference after loading: {gap:.2g} ({ROWS} rows of random tokens)",
        _usage(out, job.method, model),
    )
    return Report(lines, gap)


def _usage(out: Path, method: Method, model: Pretrained) -> str:
    here = f"jaxpeft.load_adapter({str(out)!r}, model, params)"
    if reads_elsewhere(model):
        return (
            f"{with_jaxpeft(out, model)}; other libraries' classifiers use pooling"
            f" {model.config.own_pooling!r}, so their labels differ"
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


PEFT = Target("every method", _require, _export)
