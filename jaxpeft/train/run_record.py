"""`run.json` in a run's folder: what is known when the run starts, and the config does not say."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import jax

import jaxpeft
from jaxpeft import atomic
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.train.evaluator import metric_of
from jaxpeft.train.records import RUN
from jaxpeft.train.setup import Setup


def write(folder: Path, setup: Setup, trainable: int, total: int) -> None:
    """Write the record of a run atomically; a resumed run replaces it.

    Args:
        folder: folder of the run.
        setup: prepared run.
        trainable: number of trainable parameters.
        total: number of parameters, including the adapter.
    """
    content = {
        "steps": setup.steps,
        "metric": metric_of(setup),
        "problem": setup.data.problem,
        "labels": list(setup.data.labels),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "base_sha256": setup.provenance.identity["base"]["sha256"],
        "rows": _counts(setup),
        "data": setup.provenance.identity["data"],
        "environment": _environment(setup),
    }
    atomic.write_text(folder / RUN, json.dumps(content, indent=2) + "\n")


def _counts(setup: Setup) -> dict[str, dict[str, int]]:
    """Return the numbers of rows and tokens of each split; none for a stream, whose length is
    unknown, and for test rows that are the validation rows.
    """
    data = setup.data
    splits: dict[str, Encoded] = {} if setup.config.data.streaming else {"train": data.train}
    splits["validation"] = data.validation
    if data.judged_by == "test":
        splits["test"] = data.test
    return {name: dict(split.counts) for name, split in splits.items()}


def _environment(setup: Setup) -> dict[str, Any]:
    devices = setup.mesh.devices.flat
    return {
        "jaxpeft": jaxpeft.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "device": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
    }
