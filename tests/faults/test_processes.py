"""Several processes that are one run: stopped together, ended together, gone on from the same
step.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.faults.conftest import Job, Marks, files
from tests.faults.team import HEARTBEAT, Member, Team
from tests.faults.test_resume import figures
from tests.train.runs import write_config, write_rows

STEPS = 12
PAUSE, SLOW = 1.0, 2.0
"""Seconds before each step: a signal is heard of everywhere in about a second, on a busy machine in
several.
"""


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_models: Mapping[str, Path]) -> Path:
    """The config of a run over all devices."""
    folder = tmp_path_factory.mktemp("team")
    rows = write_rows(folder / "rows.jsonl", "text", 100)
    return write_config(
        folder / "mine.py",
        tiny_models["llama"],
        rows,
        model__task="causal_lm",
        model__scan_layers=True,
        mesh__data=-1,
        method__dropout=0.1,
        train__steps=STEPS,
        evaluation__every_steps=6,
        checkpoint__every_steps=4,
        checkpoint__keep=9,
        log__every_steps=1,
        log__tensorboard=False,
        log__plot=False,
        optimizer__learning_rate=1e-2,
    )


@pytest.fixture(scope="session")
def two(config: Path) -> Team:
    """The run of two processes that nothing happened to."""
    team = Team(Job(config, config.parent / "two"), 2)
    for done in team():
        assert done.returncode == 0, done.stderr
    return team


@pytest.fixture
def team(two: Team, tmp_path: Path) -> Team:
    """The same run in a folder of its own."""
    return Team(two.job.at(tmp_path / "run"), 2)


@pytest.mark.alternatives("0-in", "1-in")
@pytest.mark.parametrize(
    ("process", "fault"), [(1, "in_step:3:term"), (0, "in_step:3:term"), (1, "in_compile:1:term")]
)
@pytest.mark.slow
def test_case_7_a_signal_to_one_process_stops_both_at_the_same_step(
    team: Team, two: Team, marks: Marks, process: int, fault: str
) -> None:
    ended = team(members={process: Member(fault, PAUSE), 1 - process: Member(pause=PAUSE)})
    for done in ended:
        marks.exit(done, 143)
    step = team.job.steps[-1]
    assert 0 <= step < STEPS
    marks.message(
        ended[0], f"stopped on request; step {step} is saved, the same command resumes from it"
    )
    # the second says nothing of what it does too; what Gloo says may be cut anywhere, so words are
    # looked for
    for word in ("loading", "tokenizing", "compiling the", "stopped on request"):
        assert word in ended[0].stderr
        assert word not in ended[1].stderr
    assert len(set(map(len, (team.batches(i).read_text().splitlines() for i in range(2))))) == 1
    for done in team():
        marks.exit(done, 0)
        marks.in_time(done)
    marks.same_end(team.job, two.job)


@pytest.mark.alternatives("0", "1")
@pytest.mark.parametrize("process", [1, 0])
@pytest.mark.slow
def test_case_8_a_process_that_is_killed_ends_the_other_and_all_go_on_together(
    team: Team, two: Team, marks: Marks, process: int
) -> None:
    ended = dataclasses.replace(team, heartbeat=HEARTBEAT)(
        members={process: Member("in_step:6:kill")}
    )
    killed, left = ended[process], ended[1 - process]
    assert killed.returncode == -9
    assert left.returncode not in (0, 2, 130, 143)
    assert left.seconds < HEARTBEAT + 10
    if process == 1:
        marks.message(left, "process 1 (", "has sent no heartbeat for", "start them again")
    assert (
        "process 0 has exited" in left.stderr
        or "no heartbeat" in left.stderr
        or "JAX distributed" in left.stderr
    )
    before = files(team.job.checkpoints)
    assert 4 in team.job.steps
    again = team()
    for done in again:
        marks.exit(done, 0)
        marks.in_time(done)
    assert "restoring step 4" in again[0].stderr
    marks.kept(
        {name: data for name, data in before.items() if name.startswith("4/")},
        files(team.job.checkpoints),
    )
    marks.same_end(team.job, two.job)


@pytest.mark.slow
def test_case_9_a_host_whose_view_is_behind_for_a_moment_goes_on_from_the_same_step(
    team: Team, two: Team, marks: Marks
) -> None:
    stopped_at_8(two, team)
    ended = team(members={1: Member(hidden=8, hidden_for=1.0)})
    for done in ended:
        marks.exit(done, 0)
        marks.in_time(done)
    marks.message(ended[0], "restoring step 8")
    marks.same_end(team.job, two.job)


@pytest.mark.slow
def test_case_9_a_host_that_never_sees_the_newest_step_is_refused(
    team: Team, two: Team, marks: Marks
) -> None:
    stopped_at_8(two, team)
    before = files(team.job.checkpoints)
    ended = team(members={1: Member(hidden=8)})
    for done in ended:
        marks.exit(done, 1)
        marks.in_time(done)
    said = (
        f"[process 1] jaxpeft: {team.job.checkpoints}/8: is the newest checkpoint of process 0,"
        " but process 1 does not see it"
    )
    marks.message(ended[1], said)
    marks.message(ended[0], "process 1 on ", "failed, all processes exit: ")
    marks.kept(before, files(team.job.checkpoints))
    assert files(team.job.checkpoints) == before


@pytest.mark.slow
def test_case_9_a_folder_that_is_not_shared_is_refused(
    team: Team, two: Team, marks: Marks, tmp_path: Path
) -> None:
    stopped_at_8(two, team)
    other = tmp_path / "other"
    shutil.copytree(team.job.checkpoints / "4", other / "checkpoints" / "4")
    ended = team(members={1: Member(workdir=other, hidden=-1)})
    for done in ended:
        marks.exit(done, 2)
        marks.early(done)
    marks.message(
        ended[1],
        f"--workdir {other}: is not shared: process 1 on ",
        "that all hosts share",
    )


def stopped_at_8(whole: Team, team: Team) -> None:
    """Copy what a run has left, up to step 8."""
    for step in (4, 8):
        shutil.copytree(whole.job.checkpoints / str(step), team.job.checkpoints / str(step))


@pytest.mark.slow
def test_case_19_gone_on_with_4_2_and_1_processes_the_batches_are_the_same(
    config: Path, two: Team, marks: Marks, tmp_path: Path
) -> None:
    job, seen = Job(config, tmp_path / "run"), list[list[str]]()
    for processes in (4, 2):
        team = Team(job, processes)
        for done in team(members={1: Member("in_step:2:term", SLOW)}, pause=SLOW):
            marks.exit(done, 143)
        seen += team.rows()
        assert job.steps[-1] == len(seen) < STEPS
    before = files(job.checkpoints / str(len(seen)))
    alone = Team(job, 1)
    (done,) = alone()
    marks.exit(done, 0)
    marks.message(done, f"restoring step {len(seen)} from", "on 2 of 2 device(s)")
    marks.in_time(done)
    marks.kept(before, files(job.checkpoints / str(len(seen))))
    seen += alone.rows()
    assert seen == two.rows()
    losses = [
        [line["loss"] for line in figures(of.workdir) if "loss" in line] for of in (two.job, job)
    ]
    assert len(losses[0]) == len(losses[1]) == STEPS
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)


@pytest.mark.slow
def test_case_7_a_process_by_itself_that_was_joined_stops_by_the_same_notice(
    config: Path, marks: Marks, tmp_path: Path
) -> None:
    team = Team(Job(config, tmp_path / "run"), 1)
    (done,) = team(members={0: Member("in_step:2:term", PAUSE)})
    marks.exit(done, 143)
    assert 2 <= team.job.steps[-1] < STEPS
    marks.message(done, f"stopped on request; step {team.job.steps[-1]} is saved")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--config.train.seed=7",), "train.seed: 7 here, 0 in process 0"),
        (("--config.train.batch_size=16",), "train.batch_size: 16 here, 8 in process 0"),
    ],
)
@pytest.mark.slow
def test_case_20_processes_with_other_options_are_refused(
    team: Team, marks: Marks, arguments: tuple[str, ...], said: str
) -> None:
    ended = team(members={1: Member(arguments=arguments)})
    for done in ended:
        marks.exit(done, 2)
        marks.early(done)
    marks.message(
        ended[1],
        "[process 1] jaxpeft: process 1 on ",
        "has a different config than process 0",
        said,
    )
    assert not team.job.checkpoints.exists()


@pytest.mark.slow
def test_case_20_processes_that_read_other_rows_are_refused(
    team: Team, marks: Marks, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", "text", 99)
    ended = team(members={1: Member(arguments=(f"--config.data.train={rows}",))})
    for done in ended:
        marks.exit(done, 2)
        marks.early(done)
    marks.message(
        ended[1], "has a different base or rows than process 0", "data.sources.train: ", most=8
    )
