"""launch/skypilot.yaml: by an own list of what it may have, by SkyPilot itself where it is installed, and its two scripts."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from jaxpeft import clusters
from tests.launch.helpers import LAUNCH, ROOT, Stubs, bash, mutated, shellcheck

TASK = LAUNCH / "skypilot.yaml"
FIELDS = {"name", "resources", "num_nodes", "workdir", "file_mounts", "envs", "secrets", "setup", "run"}
RESOURCES = {"accelerators", "use_spot", "disk_size", "job_recovery"}
RECOVERY = {"strategy", "recover_on_exit_codes", "max_restarts_on_errors"}
ACCELERATOR = r"(tpu-(v5litepod|v5p|v6e)-\d+|(H100|H200|A100|A100-80GB|L4|B200):\d+)"


def parse(path: Path) -> dict[str, Any]:
    """Reads a task and refuses what SkyPilot does not have, or takes and does not find, or with which a run does not go on.

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
        "recover_on_exit_codes": 2 in codes or 0 in codes or not {1, 134, 137, 143} <= set(codes),
        "max_restarts_on_errors": recovery.get("max_restarts_on_errors", 0) != 0,  # they count for bad input too
        "num_nodes": not isinstance(task.get("num_nodes"), int) or task["num_nodes"] < 1,
        "file_mounts": task.get("file_mounts", {}).get("/runs", {}).get("mode") != "MOUNT",
        "secrets": any(task.get("secrets", {}).values()) or "HF_TOKEN" in task.get("envs", {}),
        "run": "\nexec " not in task.get("run", ""),
    }
    if wrong := [name for name, bad in found.items() if bad]:
        raise ValueError(", ".join(wrong))
    return task


MISTAKES = {
    "a misspelt field of the resources": ("accelerators:", "accelerator:", "accelerator, accelerators"),
    "a misspelt field": ("\nrun: |", "\nruns: |", "runs, run"),
    "a TPU that there is not": ("H100:8", "tpu-v99-8", "accelerators"),
    "nodes in words": ("num_nodes: 1", "num_nodes: two", "num_nodes"),
    "bad input is started again": ("[1, 134,", "[1, 2, 134,", "recover_on_exit_codes"),
    "a stop is not": ("139, 143]", "139]", "recover_on_exit_codes"),
    "any error is started again": ("EAGER_NEXT_REGION", "EAGER_NEXT_REGION\n    max_restarts_on_errors: 3", "max_restarts_on_errors"),
    "the runs are copied and lost": ("mode: MOUNT", "mode: COPY", "file_mounts"),
    "a secret in the file": ('HF_TOKEN: ""', "HF_TOKEN: hf_abc", "secrets"),
    "a shell keeps the signal": ("exec ~/", "~/", "run"),
}  # fmt: skip


def test_the_task_is_sound() -> None:
    parse(TASK)


@pytest.mark.parametrize(("before", "after", "said"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_refused(before: str, after: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^{said}$"):
        parse(mutated(TASK, before, after, tmp_path))


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing(part: str, tmp_path: Path) -> None:
    (tmp_path / part).write_text("#!/usr/bin/env bash\nexport CONFIG RUN ARGS EXTRA\n" + parse(TASK)[part])
    found = shellcheck(tmp_path / part, "--exclude=SC2154")  # the variables come from `envs`
    assert (found.returncode, found.stdout) == (0, "")


def run_part(part: str, stubs: Stubs, home: Path, **env: str) -> subprocess.CompletedProcess[str]:
    task = parse(TASK)
    script = home / part
    script.write_text(task[part])
    given = {name: str(value) for name, value in task["envs"].items()}
    return bash(script, env=stubs.environment(**(given | {"HOME": str(home)} | env)))


def test_run_starts_the_trainer_with_all_arguments(stubs: Stubs, tmp_path: Path) -> None:
    python = tmp_path / "jaxpeft-venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(stubs.add("python", "exit 143"))
    done = run_part("run", stubs, tmp_path, CONFIG="a b.py", RUN="llama", ARGS="--config.method.rank=8 --traceback")
    assert done.returncode == 143
    (call,) = stubs.calls("python")
    more = ["--config.method.rank=8", "--traceback"]
    assert call == ["-m", "jaxpeft.train", "--config", "a b.py", "--workdir", "/runs/llama", *more]


def test_setup_installs_pinned_versions_for_the_accelerator(stubs: Stubs, tmp_path: Path) -> None:
    stubs.add("python3")
    assert run_part("setup", stubs, tmp_path, EXTRA="tpu").returncode == 0
    *_, venv, install = stubs.calls("python3")
    assert venv[:3] == ["-m", "uv", "venv"] and "3.12" in venv
    assert install[-3:] == ["--constraint", "launch/constraints.txt", ".[tpu]"]


@pytest.mark.parametrize("rank", [0, 1])
def test_nodes_find_each_other(rank: int) -> None:
    place = clusters.find(
        {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": str(rank)}
    )
    assert place.coordinator.startswith("10.0.0.1:") and (place.processes, place.process) == (2, rank)


# ------------------------------------------------------------------------------------------------------- SkyPilot itself


def by_skypilot(path: Path, home: Path, *variables: str) -> subprocess.CompletedProcess[str]:
    python = ROOT / ".venv" / "skypilot" / "bin" / "python"
    if not python.exists():
        pytest.skip("SkyPilot is not installed beside jaxpeft; `make test` does it: make .venv/.installed-skypilot")
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    words = [str(python), "-W", "ignore", str(Path(__file__).parent / "sky_task.py"), str(path), *variables]
    env |= {"HOME": str(home), "SKYPILOT_DISABLE_USAGE_COLLECTION": "1"}
    return subprocess.run(words, env=env, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_skypilot_reads_the_task(tmp_path: Path) -> None:
    done = by_skypilot(TASK, tmp_path, "CONFIG=b.py")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["accelerators"] == {"H100": 8} and said["use_spot"] and said["num_nodes"] == 1
    assert said["job_recovery"]["recover_on_exit_codes"] == [1, 134, 137, 139, 143]
    assert said["mounts"] == {"/runs": ["jaxpeft-runs", "MOUNT"]}
    assert said["envs"]["CONFIG"] == "b.py" and said["secrets"] == ["HF_TOKEN"]


@pytest.mark.parametrize("mistake", ["a misspelt field of the resources", "a misspelt field", "nodes in words"])
def test_skypilot_refuses_a_mistake(mistake: str, tmp_path: Path) -> None:
    before, after, _ = MISTAKES[mistake]
    done = by_skypilot(mutated(TASK, before, after, tmp_path), tmp_path)
    assert done.returncode == 1 and re.search(
        r"Invalid|not a valid|Unsupported|Found unsupported|num_nodes", done.stderr
    )
