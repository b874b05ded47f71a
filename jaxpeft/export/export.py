"""Exporting an adapter as files of another library, or as a merged model.

The result is loaded again and its logits are compared with those of the adapter before the folder
gets its final name, so a folder that exists is complete. An adapter that changes nothing is refused
before that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from jaxpeft import atomic
from jaxpeft.errors import AdapterError, ConfigError
from jaxpeft.export.export_job import Job, Report
from jaxpeft.export.export_targets import TARGETS
from jaxpeft.export.probe import gap_of, logits, rounding_of
from jaxpeft.export.request import ExportRequest, outline_of, require_free
from jaxpeft.hub.adapters.adapter_folder import read_adapter
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.adapters.load import check_base, load_adapter
from jaxpeft.json_files import read_json

__all__ = ["ExportRequest", "Report", "export"]


def export(request: ExportRequest) -> Report:
    """Export an adapter.

    Raises:
        ConfigError: The folder is not empty, the task is unknown, or the format cannot hold the
            adapter; the message names one that can.
        AdapterError: The adapter is invalid, belongs to another base, is already merged into
            this one, or does not change its outputs.
        WeightsError: The base cannot be used.
        ExportError: The logits of the exported adapter or model differ; no files remain.
    """
    require_free(request.out)
    target = TARGETS[request.to]
    adapter = read_adapter(request.adapter)
    outline = outline_of(request, adapter)
    target.require(request, adapter, outline)
    for part in adapter.parts:
        check_base(part, read_json(part / CONFIG), outline.model, allow_base=request.allow_base)
    with _work_folder(request.out) as folder:
        base = outline.read(log_head=False)
        method, params = load_adapter(
            adapter.folder, outline.model, base, allow_base=request.allow_base
        )
        outline.log_new_head(base, params)
        job = Job(request, adapter, outline, base, method, params)
        del base, params  # a target may free them
        change = _require_change(job)
        report = target.export(job, folder)
    line = f"largest logit difference of the adapter from its base: {change:.2g}"
    lines = (*report.lines[:-1], line, report.lines[-1])
    return dataclasses.replace(report, lines=lines, change=change)


def _require_change(job: Job) -> float:
    """Return the largest difference of logits between the adapter and its base.

    Raises:
        AdapterError: On the probe batch, the logits of both are equal up to rounding.
    """
    adapted = logits(job.outline.model, job.params, job.method)
    plain = logits(job.outline.model, job.base, job.method)
    gap, most = gap_of(adapted, plain), rounding_of(plain)
    if gap <= most and not job.request.allow_no_op:
        raise AdapterError(
            f"{job.request.adapter}: is a no-op: with it, the model computes the logits of its base"
            f" (on the probe batch they differ by {gap:.2g}; up to {most:.2g} is rounding). The"
            " adapter was not trained (a fresh LoRA has B = 0), or its files are not those of the"
            " training; to export it anyway, pass --allow-no-op"
        )
    return gap


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
                f"--output {out}: cannot be written ({error.strerror}); choose another folder"
            ) from None
        yield temporary
