"""Crashes and storage: nothing that was committed is lost, and a run goes on to the end that it would have had.

The numbers are those of the table in docs/reliability.md.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.faults.conftest import Job, damage, largest

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("fault", ["in_step:5", "in_save:3", "in_eval:3"])
def test_case_1_a_kill_anywhere_and_the_same_command_ends_as_if_nothing_had_happened(
    job: Job, whole: Job, fault: str
) -> None:
    assert job(fault=fault).returncode == -9
    done = job()
    assert done.returncode == 0, done.stderr
    assert job.digest() == whole.digest()


def test_case_2_arrays_without_a_manifest_are_no_step(job: Job, whole: Job) -> None:
    assert job(fault="after_arrays:2").returncode == -9
    assert job.steps == [2, 4]
    done = job()
    assert f"{job.checkpoints}/4: has no manifest.json: its saving was interrupted; going on from step 2" in done.stderr
    assert "restoring step 2" in done.stderr
    assert job.digest() == whole.digest()
    assert (job.checkpoints / "4.set-aside").is_dir()


def test_case_2_a_first_step_without_a_manifest_starts_anew_and_says_so(job: Job, whole: Job) -> None:
    assert job(fault="after_arrays:1").returncode == -9
    done = job()
    assert f"{job.checkpoints}/2: has no manifest.json: its saving was interrupted; starting anew" in done.stderr
    assert job.digest() == whole.digest()


def test_case_3_killed_while_an_old_step_is_deleted_a_good_one_is_left(job: Job, whole: Job) -> None:
    assert job(fault="in_delete:1").returncode == -9
    done = job()
    assert "restoring step 6" in done.stderr
    assert job.digest() == whole.digest()


def test_case_4_a_signal_in_a_step_saves_that_step(job: Job, whole: Job) -> None:
    done = job(fault="in_step:3:term")
    assert done.returncode == 143, done.stderr
    assert "stopped on request; step 3 is saved" in done.stderr
    assert job.steps[-1] == 3
    assert job().returncode == 0
    assert job.digest() == whole.digest()


@pytest.mark.parametrize("fault", ["in_eval:3:term", "after_arrays:2:term"])
def test_case_5_a_signal_anywhere_else_loses_nothing(job: Job, whole: Job, fault: str) -> None:
    done = job(fault=fault)
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr
    assert job().returncode == 0
    assert job.digest() == whole.digest()


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_cases_12_and_13_a_damaged_step_is_told_and_the_one_before_it_is_taken(job: Job, whole: Job, how: str) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    (newest, before) = (job.steps[-1], job.steps[-2])
    file = largest(job.checkpoints / str(newest))
    damage(file, how)
    others = {path: path.read_bytes() for path in (job.checkpoints / str(before)).rglob("*") if path.is_file()}
    done = job()
    assert done.returncode == 0, done.stderr
    what = "is missing" if how == "gone" else "is damaged: its checksum does not match"
    name = file.relative_to(job.checkpoints / str(newest))
    assert f"{job.checkpoints}/{newest}: {name} {what}; going on from step {before}" in done.stderr
    assert job.digest() == whole.digest()
    assert all(path.read_bytes() == data for path, data in others.items() if path.exists())


def test_case_13_an_empty_folder_and_junk_are_no_steps(job: Job, whole: Job) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    (job.checkpoints / "99").mkdir()
    (job.checkpoints / "98").write_text("junk")
    (job.checkpoints / "notes").mkdir()
    done = job()
    assert done.returncode == 0, done.stderr
    assert f"{job.checkpoints}/99: has no manifest.json" in done.stderr
    assert job.digest() == whole.digest()


def test_case_14_all_damaged_is_an_error_that_lists_each(job: Job, whole: Job) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    for step in job.steps:
        damage(largest(job.checkpoints / str(step)), "flipped")
    done = job()
    assert done.returncode == 1
    for step in job.steps:
        assert f"{job.checkpoints}/{step}: " in done.stderr
    assert "no saved step is good; restore one from a copy, or give another --workdir" in done.stderr
    assert len(job.steps) == 2


def test_case_15_a_copied_checkpoint_is_as_good(job: Job, whole: Job, tmp_path: Path) -> None:
    assert job(fault="in_step:5:term").returncode == 143
    moved = job.at(tmp_path / "elsewhere")
    moved.workdir.mkdir()
    shutil.copytree(job.checkpoints, moved.checkpoints)
    done = moved()
    assert "restoring step 5" in done.stderr
    assert moved.digest() == whole.digest()


def test_case_16_a_second_run_in_the_folder_is_refused(job: Job) -> None:
    from jaxpeft.training.lock import Lock

    job.workdir.mkdir()
    with Lock(job.workdir):
        done = job()
    assert done.returncode == 2
    assert f"--workdir {job.workdir}: a run is going on there (" in done.stderr


def test_case_17_the_newest_step_is_the_highest_whatever_the_clock_said(job: Job, whole: Job) -> None:
    import os

    assert job(fault="in_step:5:term").returncode == 143
    for n, step in enumerate(reversed(job.steps)):
        os.utime(job.checkpoints / str(step), (1e9 + n, 1e9 + n))
    done = job()
    assert "restoring step 5" in done.stderr
    assert job.digest() == whole.digest()
