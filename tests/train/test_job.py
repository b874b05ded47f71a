"""Whole runs on tiny models: what they leave behind, and that options are obeyed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError, TrainingError
from jaxpeft.methods import starts
from jaxpeft.train import job
from jaxpeft.train.records import read_lines
from jaxpeft.train.setup import prepare
from tests.train.runs import Finished, finish, short_config, write_rows

MakeConfig = Callable[..., Config]


def test_a_run_leaves_its_files_and_learns(finished: Finished) -> None:
    run, result = finished.folder, finished.result
    for name in (
        "config.json",
        "metrics.jsonl",
        "summary.json",
        "curves.png",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/jaxpeft.json",
    ):
        assert (run / name).is_file(), name
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((run / "tensorboard").glob("events.*"))

    summary = json.loads((run / "summary.json").read_text())
    assert summary["before"]["accuracy"] < 0.7
    assert result.test["accuracy"] == summary["methods"]["lora"]["validation"]["accuracy"]
    assert "test" not in summary["methods"]["lora"]  # no test rows were given
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 63))
    losses = [line["loss"] for line in lines if "loss" in line]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert lines[-1].keys() >= {
        "best_validation/accuracy",
        "best_validation/f1_macro",
        "best_validation/mcc",
    }


def test_a_schedule_of_ranks_that_the_run_is_too_short_for_is_refused_before_weights_are_read(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(
        method="adalora", method__initial_steps=2, method__final_steps=2, train__steps=4
    )
    monkeypatch.setattr(
        "jaxpeft.hub.loading.Outline.read", lambda *_: pytest.fail("weights are read")
    )
    with pytest.raises(
        ConfigError, match=r"method\.initial_steps: 2 steps at the start and 2 at the end"
    ):
        prepare(config)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True])
def test_a_start_from_the_kernels_decomposes_each_of_them_once(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scanned: bool
) -> None:
    config = make_config(
        train__steps=1,
        optimizer__warmup_steps=None,
        model__scan_layers=scanned,
        method__init_weights="pissa",
        method__targets=("query",),
    )
    seen: list[int] = []
    largest = starts.largest_triples

    def counted(matrix: Any, *rest: Any) -> Any:
        like = jax.ShapeDtypeStruct(matrix.shape, matrix.dtype)
        # if anything needs it
        looked = jax.pure_callback(lambda value: seen.append(1) or value, like, matrix)
        return largest(looked, *rest)

    monkeypatch.setattr(starts, "largest_triples", counted)
    job.run(config, tmp_path / "run")
    layers = prepare(config).model.config.num_hidden_layers
    assert len(seen) == layers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("candidate", "rate"),
    [
        ({}, 1e-2),
        ({"method": {"name": "full"}, "learning_rate": 1e-4}, 1e-4),
        ({"method": {"name": "head"}}, 5e-3),
        ({"method": {"name": "head"}, "head_learning_rate": 1e-5}, 1e-5),
    ],
)
@pytest.mark.representatives("candidate3-*")
def test_a_candidate_is_trained_at_its_own_learning_rate(
    make_config: MakeConfig, tmp_path: Path, candidate: dict[str, Any], rate: float
) -> None:
    config = make_config(
        compare__candidates=[candidate],
        optimizer__learning_rate=1e-2,
        optimizer__head_learning_rate=5e-3,
        train__steps=3,
    )
    job.run(config.run_of(config.compare.candidates[0], 0), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert max(line.get("learning_rate", 0.0) for line in lines) == pytest.approx(rate)


@pytest.mark.slow
def test_a_finished_run_given_again_says_the_same(finished: Finished) -> None:
    lines, summary = (
        read_lines(finished.folder / "metrics.jsonl"),
        (finished.folder / "summary.json").read_text(),
    )
    second = job.run(finished.config, finished.folder)
    assert read_lines(finished.folder / "metrics.jsonl") == lines
    assert (finished.folder / "summary.json").read_text() == summary
    assert finished.result.seconds == pytest.approx(second.seconds) != 0


@pytest.mark.slow
def test_every_class_counts_whatever_is_held_out_or_drawn(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(train__steps=3)
    rows = [json.dumps({"text": f"word{i} word{i + 1}", "label": f"c{i // 2}"}) for i in range(40)]
    Path(config.data.train).write_text("\n".join(rows))
    for options in ({"data__validation_share": 0.5}, {"data__max_rows": 8}):
        changed = make_config(train__steps=3, **options)
        Path(changed.data.train).write_text("\n".join(rows))
        result = job.run(changed, tmp_path / next(iter(options)))
        assert result.params["classifier"]["bias"].shape == (20,)


@pytest.mark.slow
def test_speed_is_that_of_steps_not_of_evaluations(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = job.Evaluator.__call__

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return real(*args)

    monkeypatch.setattr(job.Evaluator, "__call__", slow)
    job.run(make_config(train__steps=6, evaluation__every_steps=2), tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    tokens = [line["tokens"] for line in lines if "tokens" in line]
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    assert all(n / rate < 0.4 for n, rate in zip(tokens[2:], rates[2:], strict=True))


def test_the_saved_adapter_gives_the_numbers_of_the_run(finished: Finished) -> None:
    path = finished.config.model.path
    model, base = jaxpeft.load(path, task="sequence_classification", num_labels=3)
    _, params = jaxpeft.load_adapter(finished.folder / "adapter", model, base)
    jax.tree.map(np.testing.assert_array_equal, params, finished.result.params)


@pytest.fixture(scope="module")
def overshot(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run at a rate so high that later steps are worse."""
    folder = tmp_path_factory.mktemp("overshot")
    config = short_config(
        tiny_models,
        folder,
        "single",
        train__steps=50,
        evaluation__every_steps=1,
        optimizer__learning_rate=3.0,
        evaluation__metric="loss",
        evaluation__patience=3,
    )
    return finish(config, folder / "run")


@pytest.mark.slow
def test_the_best_step_is_kept_not_the_last(overshot: Finished) -> None:
    result = overshot.result
    lines = read_lines(overshot.folder / "metrics.jsonl")
    by_step = {line["step"]: line["validation/loss"] for line in lines if "validation/loss" in line}
    assert len(by_step) == result.steps
    assert result.best_step == min(by_step, key=lambda step: by_step[step]) < result.steps
    assert math.isclose(result.test["loss"], by_step[result.best_step], rel_tol=1e-6)


@pytest.mark.slow
def test_patience_stops_early(overshot: Finished) -> None:
    result = overshot.result
    assert result.steps == result.best_step + 3 < 50
    again = job.run(overshot.config, overshot.folder)  # and stays stopped
    assert (again.steps, again.test) == (result.steps, result.test)


def test_a_run_saves_and_evaluates_at_the_end_of_each_epoch(finished: Finished) -> None:
    # of 48 rows, 6 steps an epoch
    lines = read_lines(finished.folder / "metrics.jsonl")
    evaluated = [line["step"] for line in lines if "validation/loss" in line]
    assert list(finished.saved) == evaluated == [*range(6, 61, 6), 62]


@pytest.mark.slow
def test_a_run_that_goes_on_does_not_evaluate_again_what_was_before(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated: list[int] = []
    real = job.Evaluator.__call__
    monkeypatch.setattr(job.Evaluator, "__call__", lambda *args: evaluated.append(1) or real(*args))
    job.run(make_config(), tmp_path / "run")
    summary, record = (
        (tmp_path / "run" / "summary.json").read_text(),
        tmp_path / "run" / "before.json",
    )
    assert len(evaluated) == 2  # before, and at the last step, whose figures are the final ones
    job.run(make_config(), tmp_path / "run")
    assert len(evaluated) == 3
    assert (tmp_path / "run" / "summary.json").read_text() == summary
    for broken in (
        "",
        "[]",
        '{"run": 1, "figures": {}}',
        record.read_text().replace('"run": "', '"run": "0'),
    ):
        evaluated.clear()
        record.write_text(broken)
        job.run(make_config(), tmp_path / "run")
        assert len(evaluated) == 2


@pytest.mark.slow
def test_figures_are_called_by_the_rows_that_they_are_of(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    test = write_rows(tmp_path / "test.jsonl", "single", 12)
    for name, options in (("validation", {}), ("test", {"data__test": str(test)})):
        caplog.clear()
        with caplog.at_level("INFO", logger="jaxpeft"):
            result = job.run(make_config(train__steps=3, **options), tmp_path / name)
        assert result.split == name
        assert f"\n{name} accuracy\n" in caplog.text
        assert f"lora on the {name} rows: " in caplog.text
        told = json.loads((tmp_path / name / "summary.json").read_text())["methods"]["lora"]
        assert "validation" in told and ("test" in told) == (name == "test")
        last = read_lines(tmp_path / name / "metrics.jsonl")[-1]
        assert {"test": "test/loss", "validation": "best_validation/loss"}[name] in last


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "options", "figure"),
    [
        ("pair", {}, "accuracy"),
        ("regression", {"data__problem": "regression"}, "pearson"),
        ("text", {}, "perplexity"),
        ("single", {"method": "bitfit"}, "accuracy"),
        (
            "single",
            {"method": "full", "model__scan_layers": True, "model__remat": "full"},
            "accuracy",
        ),
        ("text", {"train__accumulation": 4, "model__compute_dtype": "bfloat16"}, "loss"),
    ],
)
def test_every_kind_of_data_and_method_runs(
    make_config: MakeConfig, tmp_path: Path, kind: str, options: dict[str, Any], figure: str
) -> None:
    method = options.pop("method", "lora")
    result = job.run(make_config(kind, method, **options), tmp_path / "run")
    assert math.isfinite(result.test[figure])


@pytest.mark.slow
def test_a_run_that_blows_up_stops_with_the_steps_and_a_way_out(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(
        "regression",
        "full",
        data__problem="regression",
        optimizer__learning_rate=1e30,
        optimizer__clip_norm=None,
        optimizer__name="sgd",
        optimizer__schedule="constant",
        train__steps=40,
        train__most_skipped=3,
        checkpoint__every_steps=1,
    )
    with pytest.raises(
        TrainingError,
        match=(
            r"step \d+: loss is (nan|inf).*; skipped 3 steps in a row, starting at step \d+ "
            r"\(sequences .*not finite: .*newest checkpoint is step \d+, and is finite; lower"
            r" optimizer.learning_rate"
        ),
    ):
        job.run(config, tmp_path / "run")
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert sum(line.get("skipped", 0) for line in lines) == 3
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)


def test_a_metric_that_is_not_computed_is_named_with_those_that_are(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(evaluation__metric="pearson")
    with pytest.raises(
        ConfigError, match=r"evaluation.metric: 'pearson' is not a metric of this data.*accuracy"
    ):
        job.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()  # before anything was trained


def test_weights_and_biases_that_is_not_installed_is_refused_first(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"log.wandb: project 'mine' requires the package wandb"):
        job.run(make_config(log__wandb="mine"), tmp_path / "run")
