"""A run of several processes computes what one process computes: the same batches, losses, figures
and answers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.conftest import Job
from tests.faults.team import Member, Team
from tests.faults.test_resume import figures
from tests.train.runs import write_config, write_rows

STEPS = 4
OPTIONS: dict[str, Any] = {
    "mesh__data": -1,
    "method__dropout": 0.1,
    "train__steps": STEPS,
    "evaluation__every_steps": 2,
    "log__every_steps": 1,
    "log__tensorboard": False,
    "log__plot": False,
    "optimizer__learning_rate": 1e-2,
    "optimizer__warmup_steps": 1,
}


def ran(config: Path, processes: int, devices: int) -> Team:
    """Run a config in so many processes, which must end as they should."""
    team = Team(Job(config, config.parent / f"run-{processes}x{devices}"), processes, devices)
    for done in team():
        assert done.returncode == 0, done.stderr
    return team


def assert_same(one: Team, several: Team, *, shared: bool = False) -> None:
    """Say that two runs are the same but for the order in which sums were taken; `shared` where
    every process has all rows.
    """
    parts = several.processes if shared else 1
    assert [step[: len(step) // parts] for step in several.rows()] == one.rows()
    wanted, made = figures(one.job.workdir), figures(several.job.workdir)
    assert [list(line) for line in made] == [list(line) for line in wanted]
    for name in {name for line in wanted for name in line}:
        values = [[line[name] for line in lines if name in line] for lines in (made, wanted)]
        exact = name in ("step", "tokens", "learning_rate")
        np.testing.assert_allclose(
            *values, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, err_msg=name
        )


@pytest.mark.alternatives("2", "4")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.slow
def test_a_real_model_is_trained_as_by_one_process(
    assets: Path, tmp_path: Path, processes: int
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = (assets / "tinystories-2mb" / "train.jsonl").read_text().splitlines()[:40]
    rows.write_text("\n".join(lines) + "\n")
    config = write_config(
        tmp_path / "mine.py",
        assets / "stories260K" / "hf",
        rows,
        model__task="causal_lm",
        model__scan_layers=True,
        data__max_length=64,
        data__packing=True,
        train__batch_size=16,
        train__accumulation=2,
        evaluation__batch_size=16,
        **OPTIONS,
    )
    assert_same(ran(config, 1, 2 * processes), ran(config, processes, 2))


@pytest.mark.slow
@pytest.mark.alternatives("fsdp_tensor", "hybrid_fsdp", "fsdp")
@pytest.mark.parametrize("strategy", ["fsdp", "fsdp_tensor", "sequence", "hybrid_fsdp"])
def test_every_strategy_goes_over_processes(
    tmp_path: Path, tiny_models: Mapping[str, Path], strategy: str
) -> None:
    given = {**OPTIONS, "evaluation__batch_size": 5, "mesh__data": None, "mesh__strategy": strategy}
    config = write_config(
        tmp_path / "mine.py",
        tiny_models["llama"],
        write_rows(tmp_path / "rows.jsonl", "text"),
        model__task="causal_lm",
        model__scan_layers=True,
        data__packing=True,
        **given,
    )
    assert_same(ran(config, 1, 1), ran(config, 2, 2), shared=strategy == "sequence")


@pytest.mark.slow
@pytest.mark.alternatives("single-accuracy", "tags-recall")
@pytest.mark.parametrize(("kind", "figure"), [("single", "accuracy"), ("tags", "recall")])
def test_a_classification_has_the_same_figures(
    tmp_path: Path, tiny_models: Mapping[str, Path], kind: str, figure: str
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", kind, 61)
    given = (
        OPTIONS
        if kind == "single"
        else OPTIONS | {"model__task": "token_classification", "data__lengths": (8, 16)}
    )
    config = write_config(tmp_path / "mine.py", tiny_models["bert"], rows, **given)
    one, two = ran(config, 1, 4), ran(config, 2, 2)
    assert_same(one, two)
    told = [
        json.loads((of.job.workdir / "summary.json").read_text())["methods"]["lora"]["validation"]
        for of in (one, two)
    ]
    assert told[0].keys() == told[1].keys() and figure in told[0]


@pytest.mark.slow
def test_answers_and_a_start_from_data_are_the_same(
    tmp_path: Path, tiny_models: Mapping[str, Path]
) -> None:
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"word{i} word{i + 1}", "completion": f" word{i + 2}"} for i in range(50)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    config = write_config(
        tmp_path / "mine.py",
        tiny_models["llama"],
        rows,
        model__task="causal_lm",
        method__init_weights="eva",
        evaluation__samples=2,
        evaluation__sample_tokens=3,
        **OPTIONS,
    )
    one, two = ran(config, 1, 4), ran(config, 2, 2)
    assert_same(one, two)
    assert {path.name for path in two.job.workdir.iterdir()} == {
        path.name for path in one.job.workdir.iterdir()
    }


@pytest.mark.parametrize(("method", "strategy"), [("vera", None), ("full", "fsdp")])
@pytest.mark.slow
def test_processes_of_one_device_save_what_is_not_trained_and_what_has_not_begun(
    tmp_path: Path, tiny_models: Mapping[str, Path], method: str, strategy: str | None
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text", 40)
    options = OPTIONS | {
        "method__dropout": 0.0,
        "mesh__data": None,
        "mesh__strategy": strategy,
    }  # all devices of all processes
    config = write_config(
        tmp_path / "mine.py",
        tiny_models["llama"],
        rows,
        model__task="causal_lm",
        **{name: value for name, value in options.items() if not name.startswith("method")},
    )
    config.write_text(config.read_text().replace('defaults("lora")', f'defaults("{method}")'))
    team = Team(Job(config, tmp_path / "run"), 2, devices=1)
    for done in team(members={1: Member("in_compile:1:term")}):
        assert done.returncode == 143, done.stderr
    assert team.job.steps == [0]
    ended = team()
    assert [done.returncode for done in ended] == [0, 0], ended[0].stderr
    assert "restoring step 0" in ended[0].stderr
    assert_same(ran(config, 1, 2), team)


@pytest.mark.slow
def test_a_mesh_that_leaves_a_process_out_is_refused(
    tmp_path: Path, tiny_models: Mapping[str, Path]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text", 40)
    options = OPTIONS | {"mesh__data": 2}
    config = write_config(
        tmp_path / "mine.py", tiny_models["llama"], rows, model__task="causal_lm", **options
    )
    ended = Team(Job(config, tmp_path / "run"), 2)()
    assert [done.returncode for done in ended] == [2, 2]
    said = (
        "mesh: uses 2 devices of process 0, but none of process 1; set mesh.data to -1"
        " for all 4 devices"
    )
    assert said in ended[0].error


@pytest.mark.slow
def test_an_error_of_one_process_ends_all_at_once_with_its_code(
    tmp_path: Path, tiny_models: Mapping[str, Path]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text", 40)
    config = write_config(
        tmp_path / "mine.py", tiny_models["llama"], rows, model__task="causal_lm", **OPTIONS
    )
    gone = f"--config.data.train={tmp_path / 'gone.jsonl'}"
    ended = Team(Job(config, tmp_path / "run"), 2)(members={1: Member(arguments=(gone,))})
    assert [done.returncode for done in ended] == [2, 2]
    assert f"[process 1] jaxpeft: {tmp_path / 'gone.jsonl'}: " in ended[1].stderr
    assert (
        "process 1 on " in ended[0].stderr
        and f"failed, all processes exit: {tmp_path / 'gone.jsonl'}: " in ended[0].stderr
    )
