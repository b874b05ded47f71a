"""Crashes and storage: nothing that was saved is lost, and a run goes on to the end that it would
have had.
"""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from random import Random

import pytest

from jaxpeft.processes.lock import lock_folder
from tests.faults.conftest import Job, Marks, damage, files, largest

KILLS = int(os.environ.get("JAXPEFT_KILLS", "1"))
"""How often a run is killed at random: the table of docs/reliability.md is made with 50."""


@pytest.mark.alternatives("in_step:5", "in_eval:3")
@pytest.mark.parametrize("fault", ["in_step:5", "in_save:3", "in_eval:3"])
@pytest.mark.representatives("in_save:3")
def test_case_1_a_kill_anywhere_and_the_same_command_ends_as_if_nothing_had_happened(
    job: Job, whole: Job, marks: Marks, fault: str
) -> None:
    assert job(fault=fault).returncode == -9
    done = job()
    marks.exit(done, 0)
    marks.message(done, "restoring step")
    marks.in_time(done)
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_1_killed_at_random_moments_it_ends_as_if_nothing_had_happened(
    job: Job, whole: Job, marks: Marks
) -> None:
    began, random, kills = time.perf_counter(), Random(0), 0
    assert job().returncode == 0
    whole_time = time.perf_counter() - began
    while kills < KILLS:
        shutil.rmtree(job.workdir)
        patience = 1.0
        while (
            done := job(kill_after=patience * random.uniform(0.3, 0.9) * whole_time)
        ).returncode == -9:
            kills += 1
            patience *= 1.2  # on a machine that has become slower it would never come to its end
        marks.exit(done, 0)
        marks.message(done)
        marks.in_time(done)
        marks.same_end(job, whole)


@pytest.mark.slow
def test_case_2_arrays_without_a_manifest_are_no_step(job: Job, whole: Job, marks: Marks) -> None:
    assert job(fault="after_arrays:2").returncode == -9
    assert job.steps == [2, 4]
    done = job()
    marks.exit(done, 0)
    said = (
        f"{job.checkpoints}/4: has no manifest.json: saving was interrupted; resuming from step 2"
    )
    marks.message(done, said, "restoring step 2")
    marks.in_time(done)
    marks.same_end(job, whole)
    assert (job.checkpoints / "4.set-aside").is_dir()


@pytest.mark.slow
def test_case_2_a_first_step_without_a_manifest_starts_anew_and_says_so(
    job: Job, whole: Job, marks: Marks
) -> None:
    assert job(fault="after_arrays:1").returncode == -9
    done = job()
    marks.exit(done, 0)
    marks.message(
        done,
        f"{job.checkpoints}/2: has no manifest.json: saving was interrupted; starting from scratch",
    )
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_3_killed_while_an_old_step_is_deleted_a_good_one_is_left(
    job: Job, whole: Job, marks: Marks
) -> None:
    assert job(fault="in_delete:1").returncode == -9
    done = job()
    marks.exit(done, 0)
    marks.message(done, "restoring step 6")
    marks.in_time(done)
    marks.same_end(job, whole)


@pytest.mark.slow
@pytest.mark.alternatives("term-143", "int-130")
@pytest.mark.parametrize(("signal", "code"), [("term", 143), ("int", 130)])
def test_case_4_a_signal_in_a_step_saves_that_step(
    job: Job, whole: Job, marks: Marks, signal: str, code: int
) -> None:
    done = job(fault=f"in_step:3:{signal}")
    marks.exit(done, code)
    marks.message(done, "stopped on request; step 3 is saved, the same command resumes from it")
    marks.in_time(done)
    assert job.steps[-1] == 3
    assert job.here().returncode == 0
    marks.same_end(job, whole)


@pytest.mark.alternatives("in_eval:3:term", "after_arrays:2:term")
@pytest.mark.parametrize("fault", ["in_compile:1:term", "in_eval:3:term", "after_arrays:2:term"])
@pytest.mark.slow
def test_case_5_a_signal_anywhere_else_loses_nothing(
    job: Job, whole: Job, marks: Marks, fault: str
) -> None:
    done = job(fault=fault)
    marks.exit(done, 143)
    marks.message(done, "stopped on request")
    marks.in_time(done)
    assert job().returncode == 0
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_5_a_signal_before_the_first_step_says_that_nothing_was_there_to_save(
    job: Job, whole: Job, marks: Marks
) -> None:
    done = job(fault="in_eval:1:term")
    marks.exit(done, 143)
    marks.message(
        done, "stopped on request; there was nothing new to save, the same command resumes the run"
    )
    marks.in_time(done)
    assert not job.checkpoints.exists()
    assert job().returncode == 0
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_6_two_signals_and_a_kill_leave_the_newest_step_as_it_was(
    job: Job, whole: Job, marks: Marks
) -> None:
    assert job(fault="in_step:5:term").returncode == 143
    before = files(job.checkpoints)
    done = job(fault="in_eval:1:term,term,kill")  # what was before training is not evaluated again
    assert done.returncode in (-15, -9)
    marks.kept(before, files(job.checkpoints))
    again = job()
    marks.exit(again, 0)
    marks.message(again, "restoring step 5")
    marks.in_time(again)
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_10_a_full_disk_is_told_once_and_the_run_goes_on_later(
    job: Job, whole: Job, marks: Marks
) -> None:
    done = job.command(fault="in_save:3:full")
    marks.exit(done, 1)
    marks.message(
        done, f"jaxpeft: {job.checkpoints}/6: could not be saved (", "free or repair the disk"
    )
    marks.in_time(done)
    assert job.steps[:2] == [2, 4]
    again = job()
    assert "restoring step 4" in again.stderr
    marks.same_end(job, whole)


def test_case_12_a_flipped_bit_is_found_and_the_step_before_is_taken(
    job: Job, whole: Job, marks: Marks
) -> None:
    _damaged(job, whole, marks, "flipped", "is damaged: its checksum does not match")


@pytest.mark.parametrize(
    ("how", "what"), [("gone", "is missing"), ("cut", "is damaged: its checksum does not match")]
)
@pytest.mark.slow
def test_case_13_a_missing_or_cut_file_is_found_and_the_step_before_is_taken(
    job: Job, whole: Job, marks: Marks, how: str, what: str
) -> None:
    _damaged(job, whole, marks, how, what)


def _damaged(job: Job, whole: Job, marks: Marks, how: str, what: str) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    newest, before = (job.steps[-1], job.steps[-2])
    file = largest(job.checkpoints / str(newest))
    damage(file, how)
    kept = files(job.checkpoints / str(before))
    done = job.here()
    marks.exit(done, 0)
    name = file.relative_to(job.checkpoints / str(newest))
    marks.message(done, f"{job.checkpoints}/{newest}: {name} {what}; resuming from step {before}")
    marks.in_time(done)
    marks.kept(kept, files(job.checkpoints / str(before)))
    marks.same_end(job, whole)


@pytest.mark.slow
def test_case_13_an_empty_folder_and_junk_are_no_steps(job: Job, whole: Job, marks: Marks) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    (job.checkpoints / "99").mkdir()
    (job.checkpoints / "98").write_text("junk")
    (job.checkpoints / "notes").mkdir()
    done = job()
    marks.exit(done, 0)
    marks.message(done, f"{job.checkpoints}/99: has no manifest.json")
    marks.same_end(job, whole)


def test_case_13_a_manifest_that_is_not_json_is_found(job: Job, whole: Job, marks: Marks) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    newest = job.steps[-1]
    (job.checkpoints / str(newest) / "manifest.json").write_text('{"body": ')
    done = job.here("--config.train.seed=7")  # refused at the step that is gone on from
    marks.message(
        done,
        f"{job.checkpoints}/{newest}: manifest.json is damaged: it cannot be read; resuming from"
        " step",
    )


def test_case_14_all_damaged_is_an_error_that_lists_each(
    job: Job, whole: Job, marks: Marks
) -> None:
    shutil.copytree(whole.workdir, job.workdir)
    for step in job.steps:
        damage(largest(job.checkpoints / str(step)), "flipped")
    before = files(job.checkpoints)
    done = job.here()
    marks.exit(done, 2)  # which no launcher starts again
    listed = [f"{job.checkpoints}/{step}: " for step in job.steps]
    marks.message(
        done,
        *listed,
        "no checkpoint is intact; restore one from a backup, or give another --workdir",
    )
    marks.early(done)
    marks.kept(before, files(job.checkpoints))


@pytest.mark.slow
def test_case_15_a_copied_checkpoint_is_as_good(
    job: Job, whole: Job, marks: Marks, tmp_path: Path
) -> None:
    assert job(fault="in_step:5:term").returncode == 143
    moved = job.at(tmp_path / "elsewhere")
    moved.workdir.mkdir()
    shutil.copytree(job.checkpoints, moved.checkpoints)
    done = moved()
    marks.exit(done, 0)
    marks.message(done, "restoring step 5")
    marks.in_time(done)
    marks.same_end(moved, whole)


def test_case_16_a_second_run_in_the_folder_is_refused(job: Job, marks: Marks) -> None:
    job.workdir.mkdir()
    with lock_folder(job.workdir):
        before = files(job.workdir)
        done = job()
        marks.exit(done, 2)
        marks.message(done, f"--workdir {job.workdir}: another run uses it (")
        marks.early(done)
        marks.kept(before, files(job.workdir))


@pytest.mark.slow
def test_case_17_the_newest_step_is_the_highest_whatever_the_clock_said(
    job: Job, whole: Job, marks: Marks
) -> None:
    assert job(fault="in_step:5:term").returncode == 143
    for n, step in enumerate(reversed(job.steps)):
        os.utime(job.checkpoints / str(step), (1e9 + n, 1e9 + n))
    done = job()
    marks.exit(done, 0)
    marks.message(done, "restoring step 5")
    marks.in_time(done)
    marks.same_end(job, whole)
