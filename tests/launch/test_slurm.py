"""launch/slurm.sbatch: its directives, what it makes of every exit code, and the environment of its
tasks.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxpeft.processes import clusters
from tests.launch.helpers import LAUNCH, Stubs, bash, mutated

SBATCH = LAUNCH / "slurm.sbatch"
# srun starts its command once for each task, with what SLURM tells a task, and gives the highest
# exit code of all.
SRUN = """
while [[ "$1" == --* ]]; do shift; done
highest=0
for ((i = 0; i < ${NODES:-1} * ${TASKS:-2}; i++)); do
  code=0
  SLURM_STEP_NODELIST="${LIST:-node1}" SLURM_NTASKS=$((${NODES:-1} * ${TASKS:-2})) SLURM_PROCID=$i \\
    SLURM_LOCALID=$((i % ${TASKS:-2})) SLURM_NODEID=$((i / ${TASKS:-2})) SLURM_STEP_TASKS_PER_NODE="${TASKS:-2}(x${NODES:-1})" \\
    "$@" || code=$?
  ((code <= highest)) || highest=$code
done
exit $highest
"""


def directives(script: Path) -> dict[str, str]:
    """Read the #SBATCH lines as sbatch does: only those before the first command.

    Raises:
        ValueError: a line that sbatch would refuse, or not see.
    """
    found: dict[str, str] = {}
    ended = False
    for line in script.read_text().splitlines():
        ended = ended or bool(line.strip() and not line.startswith("#"))
        if not line.startswith("#SBATCH"):
            continue
        if ended:
            raise ValueError(
                f"{line}: stands after the first command, where sbatch does not read it"
            )
        (word,) = shlex.split(line.removeprefix("#SBATCH"))
        if not (match := re.fullmatch(r"--([a-z-]+)(?:=(\S+))?", word)):
            raise ValueError(f"{line}: is no option")
        if match[1] not in FORMS or not re.fullmatch(FORMS[match[1]], match[2] or ""):
            raise ValueError(f"{line}: sbatch has no such option, or not of this form")
        found[match[1]] = match[2] or ""
    return found


FORMS = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+(-\d+)?",
    "ntasks-per-node": r"\d+",
    "gpus-per-task": r"\d+",
    "gres": r"gpu(:\w+)?:\d+",
    "cpus-per-task": r"\d+",
    "exclusive": r"|user|mcs",
    "time": r"(\d+-)?\d+(:\d\d){1,2}",
    "signal": r"([RB]+:)?[A-Z0-9]+(@\d+)?",
    "requeue": "",
    "open-mode": r"append|truncate",
    "output": r"\S+",
}
"""The options that are used or would be a mistake, and what sbatch takes for their values."""


def require_sound(found: dict[str, str]) -> None:
    """Refuse directives with which a job would not go on, or JAX not find its GPUs.

    Raises:
        ValueError: naming the directive.
    """
    gpus = int(found["gres"].rsplit(":", 1)[1])
    problems = {
        "ntasks-per-node": int(found["ntasks-per-node"]) not in (1, gpus),
        "gpus-per-task": "gpus-per-task" in found,
        "requeue": "requeue" not in found,
        "open-mode": found.get("open-mode") != "append",
        "exclusive": "exclusive" not in found,
        "signal": (
            not re.fullmatch(r"TERM@(\d+)", found.get("signal", ""))
            or int(found["signal"][5:]) < 120
        ),
    }
    if wrong := [name for name, bad in problems.items() if bad]:
        raise ValueError(", ".join(wrong))


def test_the_directives_are_sound() -> None:
    require_sound(directives(SBATCH))


MISTAKES = {
    "another number of tasks than GPUs": (
        "--ntasks-per-node=8",
        "--ntasks-per-node=4",
        "ntasks-per-node",
    ),
    "a GPU bound to each task": (
        "#SBATCH --exclusive\n",
        "#SBATCH --exclusive\n#SBATCH --gpus-per-task=1\n",
        "gpus-per-task",
    ),
    "the signal goes to the script alone": ("--signal=TERM", "--signal=B:TERM", "signal"),
    "no time to save": ("TERM@300", "TERM@10", "signal"),
    "no requeue": ("#SBATCH --requeue\n", "", "requeue"),
    "the log of the first start is lost": ("#SBATCH --open-mode=append\n", "", "open-mode"),
    "an unknown option": ("--exclusive", "--exclusiv", "has no such option"),
    "a time in words": ("--time=24:00:00", "--time=24h", "not of this form"),
    "two words": ("--time=24:00:00", "--time=1 hour", "values to unpack"),
    "too late": ("#SBATCH --requeue\n", "true\n#SBATCH --requeue\n", "after the first command"),
}


@pytest.mark.parametrize(("before", "after", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_in_the_directives_are_refused(
    before: str, after: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=said):
        require_sound(directives(mutated(SBATCH, before, after, tmp_path)))


def job(
    stubs: Stubs, python: str, *, script: Path = SBATCH, scontrol: str | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    stubs.add("srun", SRUN)
    stubs.add("scontrol", scontrol)
    given = {
        "PYTHON": str(stubs.add("python", python)),
        "SLURM_JOB_ID": "17",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
    }
    return bash(
        script,
        "--config",
        "a b.py",
        "--workdir",
        "/runs/x",
        env=stubs.environment(**given, **env),
        cwd=Path("/"),
    )


CODES = {
    "done": ("exit 0", {}, 0, False),
    "bad input": ("exit 2", {}, 2, False),
    "stopped by a person": ("exit 130", {}, 130, False),
    "stopped and saved": ("exit 143", {}, 143, True),
    "stopped and saved for the hundredth time": (
        "exit 143",
        {"SLURM_RESTART_COUNT": "99"},
        143,
        True,
    ),
    "failed": ("exit 1", {}, 1, True),
    "failed in one task": ("exit $SLURM_PROCID", {}, 1, True),
    "a peer is lost": ("exit 134", {"SLURM_RESTART_COUNT": "19"}, 134, True),
    "failed again and again": ("exit 1", {"SLURM_RESTART_COUNT": "20"}, 1, False),
    "failed as often as is wanted": (
        "exit 1",
        {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"},
        1,
        False,
    ),
}


@pytest.mark.parametrize(("python", "env", "code", "again"), CODES.values(), ids=list(CODES))
def test_exit_code(python: str, env: dict[str, str], code: int, again: bool, stubs: Stubs) -> None:
    assert job(stubs, python, **env).returncode == code
    assert stubs.calls("scontrol") == ([["requeue", "17"]] if again else [])


def test_a_script_that_requeues_bad_input_would_be_noticed(stubs: Stubs, tmp_path: Path) -> None:
    job(stubs, "exit 2", script=mutated(SBATCH, "  0 | 2 | 130)", "  0 | 130)", tmp_path))
    assert stubs.calls("scontrol") == [["requeue", "17"]]


def test_a_requeue_that_slurm_refuses_is_said(stubs: Stubs) -> None:
    done = job(stubs, "exit 143", scontrol="exit 1")
    assert done.returncode == 143
    assert (
        "slurm.sbatch: SLURM refused to requeue the job; to resume, run the same sbatch command"
        in done.stderr
    )


@pytest.mark.parametrize("restarts", ["abc", "08", "-1"])
def test_what_is_no_number_is_refused_before_anything_is_started(
    restarts: str, stubs: Stubs
) -> None:
    done = job(stubs, "exit 1", MAX_RESTARTS=restarts, DRY_RUN="2")
    assert done.returncode == 2 and stubs.calls() == []
    assert done.stderr.splitlines() == [
        f"slurm.sbatch: MAX_RESTARTS={restarts}: is not a number of restarts",
        "slurm.sbatch: DRY_RUN=2: is not 0 or 1",
    ]


def test_a_dry_run_prints_the_command_of_the_tasks(stubs: Stubs) -> None:
    done = job(stubs, "exit 0", DRY_RUN="1")
    assert done.returncode == 0 and stubs.calls() == []
    python = str(stubs.folder / "bin" / "python")
    assert shlex.split(done.stdout) == [
        "srun",
        "--kill-on-bad-exit=0",
        "--wait=120",
        python,
        "-m",
        "jaxpeft.train",
        "--config",
        "a b.py",
        "--workdir",
        "/runs/x",
    ]


def test_every_task_gets_the_same_command(stubs: Stubs) -> None:
    job(stubs, "exit 0", TASKS="4")
    assert (
        stubs.calls("python")
        == [["-m", "jaxpeft.train", "--config", "a b.py", "--workdir", "/runs/x"]] * 4
    )
    (call,) = stubs.calls("srun")
    assert call[:2] == ["--kill-on-bad-exit=0", "--wait=120"]


@pytest.mark.parametrize(
    "again", [False, True], ids=["scancel", "the signal before the end of the time"]
)
def test_a_job_that_slurm_ends_itself_is_not_put_into_the_queue(
    again: bool, stubs: Stubs, tmp_path: Path
) -> None:
    stubs.add(
        "srun",
        f"trap 'exit 143' TERM; touch {tmp_path}/runs; for i in {{1..100}}; do sleep 0.1; done",
    )
    stubs.add("scontrol")
    env = stubs.environment(PYTHON=str(stubs.add("python")), SLURM_JOB_ID="17")
    script = subprocess.Popen(
        ["bash", SBATCH, "--config", "a.py"], env=env, cwd=tmp_path, start_new_session=True
    )
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
    srun = int(subprocess.check_output(["pgrep", "-P", str(script.pid)], text=True).split()[0])
    time.sleep(0.1)
    if not again:  # SLURM signals the shell too
        script.send_signal(signal.SIGTERM)
    os.kill(srun, signal.SIGTERM)
    assert script.wait(timeout=20) == 143
    assert stubs.calls("scontrol") == ([["requeue", "17"]] if again else [])


def test_tasks_find_each_other_and_their_gpus(stubs: Stubs) -> None:
    gpus = directives(SBATCH)["gres"].rsplit(":", 1)[1]
    job(stubs, "exit 0", NODES="2", TASKS=gpus, LIST="gpu[07-08]", SLURM_GPUS_ON_NODE=gpus)
    places = [
        clusters.find(call["environment"]) for call in stubs.noted() if call["name"] == "python"
    ]
    assert len({place.coordinator for place in places}) == 1 and places[0].coordinator.startswith(
        "gpu07:"
    )
    assert [(place.processes, place.process) for place in places] == [(16, i) for i in range(16)]
    assert [place.devices for place in places] == [(i % 8,) for i in range(16)]


def test_python_is_that_of_the_checkout(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("srun", SRUN)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    env = stubs.environment(SLURM_JOB_ID="17", SLURM_SUBMIT_DIR=str(tmp_path), TASKS="1")
    bash(SBATCH, "--config", "a.py", env=env, cwd=Path("/"))
    assert stubs.calls("srun")[0][2] == str(python)
