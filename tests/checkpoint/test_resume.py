"""A run interrupted after any step and started again is the uninterrupted run, bit for bit; another
run is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxpeft.checkpoint import manifest
from jaxpeft.config.schema import Config
from jaxpeft.processes.signals import Stopped
from jaxpeft.train import job, loop
from jaxpeft.train.records import read_lines
from tests.train.runs import short_config

MakeConfig = Callable[..., Config]
STEPS = 6
OPTIONS: dict[str, Any] = {
    "method": "lora",
    "train__steps": STEPS,
    "train__accumulation": 2,
    "evaluation__every_steps": 2,
    "checkpoint__every_steps": 2,
}


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    """A run with dropout (the model's and LoRA's), accumulation, evaluations and several
    checkpoints.
    """
    return dropped(make_config(**OPTIONS))


def dropped(config: Config) -> Config:
    """Add LoRA's dropout."""
    return dataclasses.replace(config, method=dataclasses.replace(config.method, dropout=0.1))  # type: ignore[call-arg]


def stop_at(monkeypatch: pytest.MonkeyPatch, step: int | None) -> None:
    """Make the next run stop, as SIGTERM would, after so many steps."""
    real = loop.train_step

    def train_step(run: Any, compiled: Any, state: Any, *rest: Any, **named: Any) -> Any:
        if step is not None and state.step >= step:
            raise Stopped(15)
        return real(run, compiled, state, *rest, **named)

    monkeypatch.setattr(loop, "train_step", train_step)


def state_of(folder: Path) -> dict[str, Any]:
    """Read the newest checkpoint, as plain arrays by path."""
    import orbax.checkpoint as ocp

    newest = max(
        (p for p in (folder / "checkpoints").iterdir() if p.name.isdigit()),
        key=lambda p: int(p.name),
    )
    tree = ocp.StandardCheckpointer().restore(newest / "state")
    leaves = {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    return {"step": int(newest.name), **leaves}


def figures(folder: Path) -> list[dict[str, Any]]:
    timing = {"tokens_per_second", "model_flops_per_second", "memory_gb"}
    lines = [
        {k: v for k, v in line.items() if k not in timing}
        for line in read_lines(folder / "metrics.jsonl")
    ]
    return [line for line in lines if len(line) > 1]


@pytest.mark.slow  # test_job has a quicker one
def test_a_finished_run_started_again_gives_its_result_without_training(
    config: Config, tmp_path: Path
) -> None:
    first = job.run(config, tmp_path / "run")
    again = job.run(config, tmp_path / "run")
    assert again.test == first.test
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)
    assert figures(tmp_path / "run").count(figures(tmp_path / "run")[0]) == 1


@pytest.fixture(scope="module")
def stopped(
    tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, Path]:
    """The run of `config`, stopped after 3 steps, and its folder; tests go on in a copy."""
    folder = tmp_path_factory.mktemp("stopped")
    made = dropped(short_config(tiny_models, folder, "single", **OPTIONS))
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            job.run(made, folder / "run")
    return made, folder / "run"


def test_the_checkpoint_holds_no_base_weight(stopped: tuple[Config, Path]) -> None:
    _, run = stopped
    held = state_of(run)
    assert any("lora_a" in name for name in held)
    assert not any(
        "embeddings" in name or ("kernel" in name and "classifier" not in name) for name in held
    )
    resolved = json.loads((run / "config.json").read_text())
    assert resolved["method"] == {"name": "lora", **resolved["method"]}
    assert resolved["method"]["dropout"] == 0.1


@pytest.mark.slow
def test_what_only_logs_may_change_on_resume(stopped: tuple[Config, Path], tmp_path: Path) -> None:
    config, run = stopped
    shutil.copytree(run, tmp_path / "run")
    chattier = dataclasses.replace(config, log=dataclasses.replace(config.log, every_steps=2))
    assert job.run(chattier, tmp_path / "run").steps == STEPS


@pytest.mark.slow
def test_a_start_from_data_is_the_same_after_an_interruption(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = dataclasses.replace(
        config.method, rank=2, init_weights="eva", eva_batches=2, eva_rho=1.5
    )  # type: ignore[call-arg]
    config = dataclasses.replace(config, method=method)
    whole = job.run(config, tmp_path / "whole")
    ranks = whole.method.rank_pattern  # type: ignore[attr-defined]
    assert sum(ranks.values()) == 2 * 13  # six sites a layer, and the pooler's
    assert max(ranks.values()) == 3
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped):
            job.run(config, tmp_path / "run")
    again = job.run(config, tmp_path / "run")
    assert again.method == whole.method
    jax.tree.map(np.testing.assert_array_equal, again.params, whole.params)


@pytest.mark.slow
def test_a_checkpoint_that_records_no_method_is_taken_for_the_configs(
    stopped: tuple[Config, Path], tmp_path: Path
) -> None:
    config, run = stopped
    shutil.copytree(run, tmp_path / "run")
    step = tmp_path / "run" / "checkpoints" / "3"
    manifest.write(
        step, 3, {key: value for key, value in manifest.read(step).items() if key != "method"}
    )
    assert job.run(config, tmp_path / "run").steps == STEPS
