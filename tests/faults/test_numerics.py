"""Numerics: what is not finite is skipped, counted, and stops the run in the end; what cannot be
right is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxpeft.data import Batches
from jaxpeft.train import from_config, losses
from jaxpeft.train import job as jobs
from jaxpeft.train.records import read_lines
from tests.faults.conftest import GOOD, Job, Marks, files

Change = Callable[[int, dict[str, Any]], dict[str, Any]]


def change_batches(patch: pytest.MonkeyPatch, change: Change) -> None:
    """Change the batches by step."""
    real = Batches.batch
    patch.setattr(
        Batches, "batch", lambda self, step, own=None: change(step, real(self, step, own))
    )


def _goes_on(job: Job, marks: Marks, *words: str) -> None:
    """Return the command again: it goes on from what is saved, and leave that as it is."""
    before = files(job.checkpoints)
    again = job.here(*words)
    assert (again.returncode, "restoring step 8" in again.stderr) == (0, True), again.stderr
    marks.kept(before, files(job.checkpoints))


@pytest.mark.slow
def test_case_24_a_batch_that_is_not_finite_is_skipped_and_counted(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a label that the model has not gives NaN
    change_batches(
        monkeypatch,
        lambda step, made: made | {"labels": made["labels"] + 1000} if step in (1, 3) else made,
    )
    kept: dict[str, Any] = {}
    monkeypatch.setattr(
        jobs, "save_adapter", lambda folder, method, params, *_, **__: kept.update(params=params)
    )
    done = job.here()
    marks.exit(done, 0)
    marks.message(done, "step 2 was skipped: loss is nan", "step 4 was skipped: loss is nan")
    marks.in_time(done)
    lines = read_lines(job.workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "skipped" in line] == [2, 4]
    assert all(bool(np.isfinite(leaf).all()) for leaf in jax.tree.leaves(kept["params"]))
    _goes_on(job, marks)


@pytest.mark.slow
def test_case_25_several_in_a_row_stop_the_run_with_their_place_and_a_finite_checkpoint(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_batches(
        monkeypatch,
        lambda step, made: made | {"labels": made["labels"] + 1000} if step >= 4 else made,
    )
    done = job.here("--config.train.most_skipped=3")
    marks.exit(done, 1)
    marks.message(
        done,
        "; skipped 3 steps in a row, starting at step 5 (sequences ",
        "not finite: bert/",
        "the newest checkpoint is step ",
        "lower optimizer.learning_rate, set optimizer.clip_norm, or check the rows",
    )
    marks.in_time(done)
    assert job.steps[-1] == 6  # with nothing of steps 5 and 6 in it
    before = files(job.checkpoints)
    monkeypatch.undo()
    again = job.here("--config.train.most_skipped=3", "--config.checkpoint.keep=9")
    assert again.returncode == 0, again.stderr
    assert all(
        math.isfinite(line["loss"])
        for line in read_lines(job.workdir / "metrics.jsonl")
        if "loss" in line
    )
    marks.kept({k: v for k, v in before.items() if k.startswith("6/")}, files(job.checkpoints))


@pytest.mark.slow
def test_case_26_a_batch_without_a_label_is_told_and_leaves_all_finite(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_batches(
        monkeypatch,
        lambda step, made: made | {"weights": made["weights"] * 0} if step == 2 else made,
    )
    done = job.here()
    marks.exit(done, 0)
    marks.message(done, "step 3: its batch (sequences ", " has no labels, so it trains nothing")
    marks.in_time(done)
    lines = read_lines(job.workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "empty" in line] == [3]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line)
    _goes_on(job, marks)


@pytest.mark.slow
def test_case_27_a_first_loss_far_above_chance_is_warned_of(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.loss_for
    monkeypatch.setattr(from_config, "loss_for", lambda *args: _scaled(real(*args), 10.0))
    done = job.here()
    marks.exit(done, 0)
    marks.message(
        done,
        "step 1: loss 1",
        "is far above that of a uniform guess, 1.10: the tokenizer or chat template may not match",
    )
    marks.in_time(done)
    _goes_on(job, marks)


@pytest.mark.slow
def test_case_27_a_gradient_of_zero_for_ten_steps_is_warned_of(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = losses.loss_for

    def constant(*args: Any) -> losses.Loss:
        loss = real(*args)

        def of(outputs: Any, batch: Any) -> Any:
            total, weight = loss(outputs, batch)
            return jax.lax.stop_gradient(total), weight

        return of

    monkeypatch.setattr(from_config, "loss_for", constant)
    done = job.here("--config.train.steps=12")
    marks.exit(done, 0)
    marks.message(
        done,
        "step 10: the gradient was exactly 0 for 10 steps: either the loss mask is empty",
    )
    assert "far above" not in done.stderr


def _scaled(loss: losses.Loss, by: float) -> losses.Loss:
    def of(logits: Any, batch: Any) -> Any:
        total, weight = loss(logits, batch)
        return total * by, weight

    return of


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            "--config.mesh.data=3",
            (
                "train.batch_size: 8 is not divisible by mesh.data 3 x accumulation 1 = 3; set it"
                " to 6 or 9"
            ),
        ),
        (
            "--config.mesh.data=16 --config.train.batch_size=16",
            "mesh.data: needs 16 devices, there are 8 (cpu); set it to 8 or less",
        ),
        (
            "--config.mesh.data=-1 --config.train.batch_size=12",
            "train.batch_size: 12 is not divisible by 8 devices = 8; set it to 8 or 16",
        ),
        (
            "--config.mesh.strategy=tensor --config.mesh.tensor=8 --config.mesh.data=1",
            "mesh.tensor: 8 does not divide the model's 4 heads; set it to 2 or 4",
        ),
        (
            "--config.train.accumulation=3",
            "train.accumulation: 3 does not divide batch_size 8; set it to 1, 2, 4, 8",
        ),
    ],
)
def test_case_36_a_batch_that_the_devices_do_not_divide_is_refused_with_the_arithmetic(
    job: Job, marks: Marks, tmp_path: Path, change: str, said: str
) -> None:
    job.workdir.mkdir()
    (job.workdir / "note").write_text("mine")
    done = job.here(*change.split())
    marks.exit(done, 2)
    marks.message(done, said)
    marks.early(done)
    marks.kept({"note": b"mine"}, files(job.workdir))


@pytest.mark.parametrize("remat", ["auto", "attention"])
@pytest.mark.slow
def test_case_37_a_step_that_may_not_fit_is_said_before_it_is_compiled(
    job: Job, marks: Marks, remat: str
) -> None:
    words = "--config.model.memory_gb=0.0005", f"--config.model.remat={remat}"
    done = job.here(*words)
    marks.exit(done, 0)
    marks.message(
        done,
        "a step may not fit in memory: estimated 0.0 GB of 0.0 GB (",
        "base 0.0",
        "lower train.batch_size or data.max_length",
    )
    assert done.stderr.index("a step may not fit") < done.stderr.index("compiling the")
    marks.in_time(done)
    _goes_on(job, marks, *words)


@pytest.mark.slow
def test_case_37_a_device_that_runs_out_of_memory_ends_the_run_in_a_line_with_what_to_lower(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."
        )

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "batch", full)
        done = job.here()
    marks.exit(done, 1)
    marks.message(
        done,
        "out of memory: RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes.; lower"
        " train.batch_size or data.max_length, raise train.accumulation, or set model.remat",
        most=1,
    )
    marks.in_time(done)
    before = files(job.workdir)
    assert job.here().returncode == 0
    marks.kept(
        {
            name: data
            for name, data in before.items()
            if "metrics" not in name and "events" not in name
        },
        files(job.workdir),
    )


LONG = [
    {"role": "user", "content": " ".join(f"word{i}" for i in range(40))},
    {"role": "assistant", "content": "word3"},
]


@pytest.mark.slow
def test_case_26_rows_cut_before_any_label_are_dropped_counted_and_too_many_refused(
    chats: Any, marks: Marks
) -> None:
    job = chats([GOOD] * 19 + [LONG])
    done = job.here("--config.data.most_dropped=0.2", "--config.data.validation_share=0.5")
    marks.exit(done, 0)
    marks.message(done, "1 truncated to 32 tokens, 1 rows dropped: no token in the loss")
    before = files(job.workdir)
    refused = job.here("--config.data.most_dropped=0.01", "--config.data.validation_share=0.5")
    marks.exit(refused, 2)
    marks.message(
        refused,
        "1 of 10 rows (10.0%) have no token in the loss among their first 32, such as ",
        "rows.jsonl:20:1 (row 20)",
        "at most 1.0% may be dropped: increase data.max_length, shorten the prompts, or increase"
        " data.most_dropped",
    )
    marks.early(refused)
    marks.kept(before, files(job.workdir))
