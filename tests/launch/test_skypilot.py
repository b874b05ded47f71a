"""launch/skypilot.yaml: by an own list of what it may have, by SkyPilot itself where it is
installed, and its two scripts.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxpeft.processes import clusters
from tests.launch.helpers import LAUNCH, ROOT, Stubs, bash, mutated, shellcheck

TASK = LAUNCH / "skypilot.yaml"
FIELDS = {
    "name",
    "resources",
    "num_nodes",
    "workdir",
    "file_mounts",
    "envs",
    "secrets",
    "setup",
    "run",
}
RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery"}
RECOVERY = {"strategy", "recover_on_exit_codes", "max_restarts_on_errors"}
AGAIN = 75
"""The code with which `run` says that a failure is to be tried again."""
ACCELERATOR = r"(tpu-(v5litepod|v5p|v6e)-\d+|(H100|H200|A100|A100-80GB|L4|B200):\d+)"


def parse(path: Path) -> dict[str, Any]:
    """Read a task and refuse what SkyPilot does not have, or take and does not find, or with which
    a run does not go on.

    Raises:
        ValueError: naming everything that is wrong.
    """
    task = yaml.safe_load(path.read_text())
    resources = task.get("resources", {})
    recovery = resources.get("job_recovery", {})
    codes = recovery.get("recover_on_exit_codes", [])
    found: dict[str, bool] = {
        **dict.fromkeys(sorted(task.keys() - FIELDS), True),
        **dict.fromkeys(sorted(resources.keys() - RESOURCES), True),
        **dict.fromkeys(sorted(recovery.keys() - RECOVERY), True),
        "accelerators": not re.fullmatch(ACCELERATOR, str(resources.get("accelerators"))),
        "strategy": recovery.get("strategy") not in ("FAILOVER", "EAGER_NEXT_REGION"),
        "recover_on_exit_codes": (
            set(codes) != {AGAIN, 143}
        ),  # any other may be that of a node which SkyPilot has ended
        "max_restarts_on_errors": (
            recovery.get("max_restarts_on_errors", 0) != 0
        ),  # they count for bad input too
        "num_nodes": not isinstance(task.get("num_nodes"), int) or task["num_nodes"] < 1,
        "file_mounts": task.get("file_mounts", {}).get("/runs", {}).get("mode") != "MOUNT",
        "secrets": any(task.get("secrets", {}).values()) or "HF_TOKEN" in task.get("envs", {}),
        "run": "\ntrap : TERM\n" not in task.get("run", ""),
    }
    if wrong := [name for name, bad in found.items() if bad]:
        raise ValueError(", ".join(wrong))
    return task


MISTAKES = {
    "a misspelt field of the resources": (
        "accelerators:",
        "accelerator:",
        "accelerator, accelerators",
    ),
    "a misspelt field": ("\nrun: |", "\nruns: |", "runs, run"),
    "a TPU that there is not": ("H100:8", "tpu-v99-8", "accelerators"),
    "nodes in words": ("num_nodes: 1", "num_nodes: two", "num_nodes"),
    "bad input is started again": ("[75,", "[2, 75,", "recover_on_exit_codes"),
    "what SkyPilot has ended is started again": ("[75,", "[75, 137,", "recover_on_exit_codes"),
    "a stop is not": ("[75, 143]", "[75]", "recover_on_exit_codes"),
    "any error is started again": (
        "EAGER_NEXT_REGION",
        "EAGER_NEXT_REGION\n    max_restarts_on_errors: 3",
        "max_restarts_on_errors",
    ),
    "the runs are copied and lost": ("mode: MOUNT", "mode: COPY", "file_mounts"),
    "a secret in the file": ('HF_TOKEN: ""', "HF_TOKEN: hf_abc", "secrets"),
    "a signal ends the shell first": ("  trap : TERM\n", "", "run"),
}


def test_the_task_is_sound() -> None:
    parse(TASK)


@pytest.mark.parametrize(("before", "after", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_refused(before: str, after: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        parse(mutated(TASK, before, after, tmp_path))


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing(part: str, tmp_path: Path) -> None:
    names = "CONFIG RUN ARGS EXTRA MAX_RESTARTS SKYPILOT_TASK_ID SKYPILOT_NODE_RANK"
    (tmp_path / part).write_text(f"#!/usr/bin/env bash\nexport {names}\n" + parse(TASK)[part])
    found = shellcheck(tmp_path / part, "--exclude=SC2154")  # the variables come from `envs`
    assert (found.returncode, found.stdout) == (0, "")


def part_of(
    part: str, stubs: Stubs, home: Path, task: Path = TASK, **env: str
) -> tuple[Path, dict[str, str]]:
    """Return a script of the task, whose store is a folder of the test, and its environment on node
    0.
    """
    found = yaml.safe_load(task.read_text())
    script = home / part
    script.write_text(found[part].replace('"/runs', f'"{home}/runs'))
    given = {name: str(value) for name, value in found["envs"].items()} | {"HOME": str(home)}
    return script, stubs.environment(
        **(given | {"SKYPILOT_TASK_ID": "sky-1", "SKYPILOT_NODE_RANK": "0"} | env)
    )


def run_part(
    part: str, stubs: Stubs, home: Path, task: Path = TASK, **env: str
) -> subprocess.CompletedProcess[str]:
    script, environment = part_of(part, stubs, home, task, **env)
    return bash(script, env=environment)


def trainer(stubs: Stubs, home: Path, answer: str) -> None:
    python = home / "jaxpeft-venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.unlink(missing_ok=True)
    python.symlink_to(stubs.add("python", answer))


def test_run_starts_the_trainer_with_all_arguments(stubs: Stubs, tmp_path: Path) -> None:
    trainer(stubs, tmp_path, "exit 143")
    done = run_part(
        "run",
        stubs,
        tmp_path,
        CONFIG="a b.py",
        RUN="llama",
        ARGS="--config.method.rank=8 --traceback",
    )
    assert done.returncode == 143
    (call,) = stubs.calls("python")
    more = ["--config.method.rank=8", "--traceback"]
    assert call == [
        "-m",
        "jaxpeft.train",
        "--config",
        "a b.py",
        "--workdir",
        f"{tmp_path}/runs/llama",
        *more,
    ]


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, 0), (2, 2), (130, 130), (143, 143), (1, AGAIN), (134, AGAIN), (137, AGAIN), (139, AGAIN)],
)
def test_what_run_says_of_an_exit_code(code: int, said: int, stubs: Stubs, tmp_path: Path) -> None:
    trainer(stubs, tmp_path, f"exit {code}")
    assert run_part("run", stubs, tmp_path).returncode == said
    # what is no failure is not noted as one
    assert (tmp_path / "runs" / ".failures").exists() == (said == AGAIN)


def test_failures_are_tried_again_so_many_times(stubs: Stubs, tmp_path: Path) -> None:
    trainer(stubs, tmp_path, "exit 1")
    tries = [run_part("run", stubs, tmp_path, MAX_RESTARTS="2") for _ in range(3)]
    assert [done.returncode for done in tries] == [AGAIN, AGAIN, 1]
    assert (
        "failed with code 1 after 2 restarts; to resume, run the same sky command"
        in tries[-1].stderr
    )
    # another job of the same run, and another node of this one, count for themselves
    assert (
        run_part("run", stubs, tmp_path, MAX_RESTARTS="2", SKYPILOT_TASK_ID="sky-2").returncode
        == AGAIN
    )
    assert (
        run_part("run", stubs, tmp_path, MAX_RESTARTS="2", SKYPILOT_NODE_RANK="1").returncode
        == AGAIN
    )
    # a stop goes on as often as it comes
    trainer(stubs, tmp_path, "exit 143")
    assert run_part("run", stubs, tmp_path, MAX_RESTARTS="2").returncode == 143


@pytest.mark.parametrize("restarts", ["many", "08"])
def test_a_number_of_restarts_that_is_none_is_refused(
    restarts: str, stubs: Stubs, tmp_path: Path
) -> None:
    trainer(stubs, tmp_path, "exit 1")
    done = run_part("run", stubs, tmp_path, MAX_RESTARTS=restarts)
    assert (
        done.returncode == 2
        and f"MAX_RESTARTS={restarts}: is not a number of restarts" in done.stderr
    )
    assert stubs.calls() == []


@pytest.mark.parametrize("waits", [True, False])
def test_a_signal_to_all_processes_leaves_the_trainer_time_to_save(
    waits: bool, stubs: Stubs, tmp_path: Path
) -> None:
    task = TASK if waits else mutated(TASK, "  trap : TERM\n", "", tmp_path / "copy")
    saves = (
        f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 143' TERM; touch {tmp_path}/up; for i in"
        " {1..80}; do sleep 0.1; done"
    )
    trainer(stubs, tmp_path, saves)
    script, environment = part_of("run", stubs, tmp_path, task)
    process = subprocess.Popen(["bash", str(script)], env=environment, start_new_session=True)
    while not (tmp_path / "up").exists():
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    # a shell that ends first ends with a code of its own, and SkyPilot takes the machine away
    # before anything is saved
    assert (process.wait(timeout=20), (tmp_path / "saved").exists()) == (
        (143, True) if waits else (-signal.SIGTERM, False)
    )


def noted(ends: list[tuple[int, int]]) -> list[int]:
    """Return the codes that SkyPilot notes for nodes that end in this order: once one has failed,
    the others are ended with 137.
    """
    codes, failed = dict[int, int](), False
    for node, code in ends:
        codes[node] = 137 if failed else code
        failed = failed or code != 0
    return [codes[node] for node in sorted(codes)]


ENDS = {
    "done": ([(0, 0), (1, 0)], False),
    "bad input of both": ([(1, 2), (0, 2)], False),
    "bad input before the other has ended": ([(0, 2), (1, 134)], False),
    "bad input of one node": ([(0, 2)], False),
    "done, and then bad input": ([(1, 0), (0, 2)], False),
    "stopped and saved": ([(1, 143), (0, 143)], True),
    "a failure to be tried again": ([(0, AGAIN), (1, AGAIN)], True),
    "a failure too many": ([(0, 1), (1, 1)], False),
    "an abort too many": ([(1, 134), (0, 134)], False),
}


@pytest.mark.parametrize(("ends", "again"), ENDS.values(), ids=list(ENDS))
def test_what_becomes_of_nodes_that_end(ends: list[tuple[int, int]], again: bool) -> None:
    codes = parse(TASK)["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert any(code in codes for code in noted(ends)) == again


def test_a_list_that_starts_bad_input_again_would_be_noticed() -> None:
    """Any code of any node is enough: with 137 in the list, a job of two nodes never ends."""
    assert 137 in noted(ENDS["bad input of both"][0])


def test_setup_installs_pinned_versions_for_the_accelerator(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("python3")
    assert run_part("setup", stubs, tmp_path, EXTRA="tpu").returncode == 0
    *_, venv, install = stubs.calls("python3")
    assert venv[:3] == ["-m", "uv", "venv"] and "3.12" in venv
    assert install[-3:] == ["--constraint", "launch/constraints.txt", ".[tpu]"]


@pytest.mark.parametrize("rank", [0, 1])
def test_nodes_find_each_other(rank: int) -> None:
    place = clusters.find(
        {
            "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
        }
    )
    assert place.coordinator.startswith("10.0.0.1:") and (place.processes, place.process) == (
        2,
        rank,
    )


# ---------------------------------------------------------------------------------- SkyPilot itself


def by_skypilot(
    path: Path, home: Path, *words: str, program: str = "sky_task.py"
) -> subprocess.CompletedProcess[str]:
    python = ROOT / ".venv" / "skypilot" / "bin" / "python"
    if not python.exists():
        pytest.skip(
            "SkyPilot is not installed beside jaxpeft; `make test-all` does it: make"
            " .venv/.installed-skypilot"
        )
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), "-W", "ignore", str(Path(__file__).parent / program), str(path), *words]
    env |= {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.slow
def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    done = by_skypilot(TASK, tmp_path, "CONFIG=b.py")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["accelerators"] == {"H100": 8} and said["use_spot"] and said["num_nodes"] == 1
    assert said["job_recovery"]["recover_on_exit_codes"] == [AGAIN, 143]
    assert said["mounts"] == {"/runs": ["jaxpeft-runs", "MOUNT"]}
    assert said["envs"]["CONFIG"] == "b.py" and said["secrets"] == ["HF_TOKEN"]


@pytest.mark.slow
def test_skypilot_makes_the_same_of_nodes_that_end(tmp_path: Path) -> None:
    done = by_skypilot(
        TASK, tmp_path, json.dumps([ends for ends, _ in ENDS.values()]), program="sky_ends.py"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [
        [noted(ends), again] for ends, again in ENDS.values()
    ]


@pytest.mark.parametrize(
    "mistake", ["a misspelt field of the resources", "a misspelt field", "nodes in words"]
)
@pytest.mark.slow
def test_skypilot_refuses_a_mistake(mistake: str, tmp_path: Path) -> None:
    before, after, _ = MISTAKES[mistake]
    done = by_skypilot(mutated(TASK, before, after, tmp_path), tmp_path)
    assert done.returncode == 1 and re.search(
        r"Invalid|not a valid|Unsupported|Found unsupported|num_nodes", done.stderr
    )
