"""launch/xpk.sh: the commands that it calls, and that xpk's shell hands SIGTERM to the trainer."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.launch.helpers import IMAGE, LAUNCH, Stubs, bash

XPK = LAUNCH / "xpk.sh"
SET = {"NAME": "llama", "CLUSTER": "pod", "TYPE": "v5litepod-16", "IMAGE": IMAGE}
RUN = ["--config", "configs/llama3_8b_lora.py", "--config.data.train=two words.jsonl"]
COMMAND = (
    "exec python -m jaxpeft.train --config configs/llama3_8b_lora.py --config.data.train=two\\"
    " words.jsonl --workdir=/runs/llama"
)
RESTARTS = [
    "--max-restarts=50",
    "--restart-on-exit-codes=1",
    "--termination-grace-period-seconds=300",
]
TABLE = (
    "[XPK] Starting workload list\\nJobset Name  Created  Status\\n{name}  now  Failed\\n[XPK] See"
    " your workloads"
)


def created(stubs: Stubs, script: Path = XPK, **more: str) -> list[list[str]]:
    done = bash(script, *RUN, env=stubs.environment(**(SET | more)))
    assert done.returncode == 0, done.stderr
    return stubs.calls("xpk")


def test_a_workload_on_tpus(stubs: Stubs) -> None:
    stubs.add("xpk")
    found, made = created(stubs)
    assert found == [
        "workload",
        "list",
        "--cluster=pod",
        "--filter-by-job=^llama$",
        "--filter-by-status=FINISHED",
    ]
    assert made == [
        "workload",
        "create",
        "--cluster=pod",
        "--workload=llama",
        "--tpu-type=v5litepod-16",
        "--num-slices=1",
        f"--docker-image={IMAGE}",
        "--storage=runs",
        *RESTARTS,
        f"--command={COMMAND}",
    ]


def test_a_workload_on_gpus_with_everything_set(stubs: Stubs) -> None:
    stubs.add("xpk")
    more = {
        "TYPE": "h100-mega-80gb-8",
        "COUNT": "4",
        "SPOT": "1",
        "PRIORITY": "high",
        "PROJECT": "mine",
        "ZONE": "us-a",
        "STORAGE": "disk",
    }
    made = created(stubs, **more)[-1]
    where = ["--cluster=pod", "--project=mine", "--zone=us-a"]
    machines = ["--device-type=h100-mega-80gb-8", "--num-nodes=4", "--spot", "--priority=high"]
    assert made[:11] == [
        "workload",
        "create",
        *where,
        "--workload=llama",
        *machines,
        f"--docker-image={IMAGE}",
    ]
    assert "--storage=disk" in made


@pytest.mark.parametrize(("name", "deleted"), [("llama", True), ("llama-2", False)])
def test_a_workload_that_has_ended_is_deleted_first(name: str, deleted: bool, stubs: Stubs) -> None:
    stubs.add("xpk", f'[[ "$2" != list ]] || printf "{TABLE.format(name=name)}\\n"')
    verbs = [call[1] for call in created(stubs)]
    assert verbs == (["list", "delete", "create"] if deleted else ["list", "create"])


def test_dry_run_calls_nothing(stubs: Stubs) -> None:
    stubs.add("xpk")
    done = bash(XPK, *RUN, env=stubs.environment(**SET, DRY_RUN="1"))
    assert done.returncode == 0 and done.stdout.startswith(
        "xpk workload create --cluster=pod --workload=llama"
    )
    assert stubs.calls() == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NAME": ""}, "NAME=: is not 1 to 28"),
        ({"CLUSTER": ""}, "CLUSTER=: is not the name of a cluster"),
        ({"TYPE": ""}, "TYPE=: is not a type"),
        ({"NAME": "a_b"}, "NAME=a_b: is not 1 to 28"),
        ({"IMAGE": "jaxpeft:latest"}, "latest may be another image after a restart"),
        ({"IMAGE": "jaxpeft"}, "IMAGE=jaxpeft: is not an image with a tag"),
        ({"SPOT": "yes"}, "SPOT=yes: is not 0 or 1"),
        ({"MAX_RESTARTS": "many"}, "MAX_RESTARTS=many: is not a number of restarts"),
        ({"COUNT": "0"}, "COUNT=0: is not a count"),
    ],
)
def test_bad_input_is_refused(change: dict[str, str], said: str, stubs: Stubs) -> None:
    stubs.add("xpk")
    done = bash(XPK, *RUN, env=stubs.environment(**(SET | change)))
    assert done.returncode == 2 and said in done.stderr
    assert stubs.calls() == []


def test_every_problem_is_said_at_once(stubs: Stubs) -> None:
    stubs.add("xpk")
    done = bash(XPK, "--name=x", env=stubs.environment(COUNT="0"))
    assert done.returncode == 2 and stubs.calls() == []
    said = [line.removeprefix("xpk.sh: ").split(":")[0] for line in done.stderr.splitlines()]
    assert said == ["NAME=", "IMAGE=", "CLUSTER=", "TYPE=", "COUNT=0", "--config", "--name"]


@pytest.mark.parametrize(
    ("more", "spot"), [({"SPOT": "0"}, False), ({}, False), ({"SPOT": "1"}, True)]
)
def test_spot_is_asked_for_by_1_alone(more: dict[str, str], spot: bool, stubs: Stubs) -> None:
    stubs.add("xpk")
    assert ("--spot" in created(stubs, DRY_RUN="0", **more)[-1]) == spot


def as_xpk_runs_it(command: str, env: dict[str, str], tmp_path: Path) -> int:
    """Run a command as xpk's container does, stops the container, and return its exit code."""
    shell = 'trap "kill -TERM \\$! 2> /dev/null" TERM; (' + command + ") & PID=$!; "
    shell += "while kill -0 $PID 2> /dev/null; do sleep 0.1; done; wait $PID; exit $?"
    process = subprocess.Popen(["bash", "-c", shell], env=env, start_new_session=True)
    while not (tmp_path / "runs").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    try:
        return process.wait(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("takes_the_place", [True, False])
def test_the_trainer_gets_sigterm_and_can_save(
    takes_the_place: bool, stubs: Stubs, tmp_path: Path
) -> None:
    stubs.add("xpk")
    command = created(stubs)[-1][-1].removeprefix("--command=")
    if not takes_the_place:
        command = command.removeprefix("exec ") + "; exit $?"
    trainer = (
        f"trap 'touch {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/runs; for i in {{1..50}};"
        " do sleep 0.1; done"
    )
    stubs.add("python", trainer)
    # without exec the container may end with the same code, but nothing is saved: the shell alone
    # gets the signal
    assert as_xpk_runs_it(command, stubs.environment(), tmp_path) == 143
    assert (tmp_path / "saved").exists() == takes_the_place
