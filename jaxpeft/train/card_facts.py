"""What the model card of a run's adapter says about its training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jaxpeft.config.data_config import DataConfig
from jaxpeft.data.rows.read import is_hub_id
from jaxpeft.hub.adapters.card import Training
from jaxpeft.train import records
from jaxpeft.train.run import RunResult
from jaxpeft.train.setup import Setup


def training_of(setup: Setup, result: RunResult, before: Mapping[str, float]) -> Training:
    """Return the description of a finished run, without folders of this machine.

    Args:
        setup: prepared run.
        result: its result.
        before: metrics before training; empty if they were not measured.
    """
    config, train = setup.config, setup.config.train
    return Training(
        datasets=[source for source in config.data.sources if is_hub_id(source)],
        rows=[_public_name(source) for source in config.data.sources],
        evaluated=_public_name(_evaluated(config.data, result.split)),
        split=result.split,
        metrics=result.test,
        before=before,
        length=f"{result.steps} steps of {train.batch_size} rows with seed {train.seed}",
        command=f"python -m jaxpeft.train --config {records.CONFIG} --workdir NEW_FOLDER",
    )


def _evaluated(data: DataConfig, split: str) -> str:
    """Return the source of a split, that of the training rows if it was held out or beside them."""
    return (data.test if split == "test" else data.validation) or data.sources[0]


def _public_name(source: str) -> str:
    return source if source.startswith("package:") or is_hub_id(source) else Path(source).name
