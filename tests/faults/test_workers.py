"""Worker processes that fail: told in time, none left behind, nothing lost."""

from __future__ import annotations

import multiprocessing

import pytest

from jaxpeft.data import pipeline
from tests.faults import workers
from tests.faults.conftest import Done, Job, Marks, files

OPTIONS = (
    "--config.data.workers=1",
    "--config.data.worker_timeout=5",
    "--config.checkpoint.every_steps=1",
)


def _goes_on(job: Job, marks: Marks, done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process is left, and without workers the run goes on from what was saved before the fault."""
    assert multiprocessing.active_children() == []
    marks.in_time(done)
    before = files(job.checkpoints)
    assert max(job.steps) >= 1
    monkeypatch.undo()
    again = job.here(
        "--config.data.workers=0",
        "--config.checkpoint.every_steps=1",
        "--config.checkpoint.keep=99",
    )
    assert again.returncode == 0, again.stderr
    marks.kept(before, files(job.checkpoints))


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            workers.Ending,
            (
                "data.workers: a worker process ended with exit code 9; set data.workers=0 to see"
                " the cause"
            ),
        ),
        (
            workers.Hanging,
            (
                "data.workers: no item from the worker processes for 5 s; increase"
                " data.worker_timeout"
            ),
        ),
    ],
)
@pytest.mark.slow
def test_case_31_a_worker_that_ends_or_hangs_is_told(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch, kind: type, said: str
) -> None:
    monkeypatch.setattr(pipeline, "Batches", kind)
    done = job.here(*OPTIONS)
    marks.exit(done, 1)
    marks.message(done, said)
    _goes_on(job, marks, done, monkeypatch)


@pytest.mark.slow
def test_case_31_a_worker_that_raises_is_told_with_its_own_error(
    job: Job, marks: Marks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "Batches", workers.Raising)
    done = job.here(*OPTIONS)
    marks.exit(done, 1)
    marks.message(
        done,
        "jaxpeft: ZeroDivisionError: three is too many (",
        "workers.py:19); run with --traceback for details",
    )
    _goes_on(job, marks, done, monkeypatch)
