"""launch/local.sh: how it starts processes, passes signals on, which exit code it gives; and that
it really trains.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conftest import CACHE
from tests.launch.helpers import LAUNCH, ROOT, Stubs, bash, mutated
from tests.train.runs import tiny_models, write_config, write_rows

__all__ = ["tiny_models"]
LOCAL = LAUNCH / "local.sh"
# Python that does as the test says, by the number of its process; what is asked with -c is answered
# by the real one.
ANSWER = f"""
[[ "$1" != -c ]] || exec {sys.executable} "$@"
process=0
while (($# > 0)); do [[ "$1" != --process ]] || process="$2"; shift; done
term() {{ echo "$process" >> "$MARKS/term"; exit "${{STOPPED:-143}}"; }}
stay() {{ for ((i = 0; i < 100; i++)); do sleep 0.1; done; }}
trap term TERM
echo "$process" >> "$MARKS/started"
eval "$(cut -d'|' -f$((process + 1)) <<< "$DO")"
"""


def started(
    stubs: Stubs, tmp_path: Path, do: str = "exit 0|exit 0", **env: str
) -> tuple[Path, dict[str, str]]:
    python = stubs.add("python", ANSWER)
    return python, stubs.environment(PYTHON=str(python), MARKS=str(tmp_path), DO=do, **env)


def test_one_process_is_the_trainer_itself(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, DEVICES="4")
    assert bash(LOCAL, "--config", "a b.py", env=env).returncode == 0
    assert stubs.calls("python") == [["-m", "jaxpeft.train", "--config", "a b.py"]]
    assert stubs.noted()[0]["environment"]["JAX_NUM_CPU_DEVICES"] == "4"


def test_one_process_sees_as_many_gpus_as_are_given(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, GPUS="2")
    assert bash(LOCAL, "--config", "a.py", env=env).returncode == 0
    assert stubs.noted()[0]["environment"]["CUDA_VISIBLE_DEVICES"] == "0,1"


def test_a_dry_run_prints_the_commands(stubs: Stubs, tmp_path: Path) -> None:
    python, env = started(stubs, tmp_path, DRY_RUN="1", DEVICES="4", GPUS="1")
    one = bash(LOCAL, "--config", "a b.py", env=env)
    trainer = [str(python), "-m", "jaxpeft.train", "--config", "a b.py"]
    assert shlex.split(one.stdout) == [
        "env",
        "JAX_NUM_CPU_DEVICES=4",
        "CUDA_VISIBLE_DEVICES=0",
        *trainer,
    ]
    two = bash(LOCAL, "--config", "a b.py", env=env | {"PROCESSES": "2"})
    for index, line in enumerate(two.stdout.splitlines()):
        place = ["--coordinator", "127.0.0.1:PORT", "--processes", "2", "--process", str(index)]
        devices = ["JAX_NUM_CPU_DEVICES=4", f"CUDA_VISIBLE_DEVICES={index}"]
        assert shlex.split(line) == ["env", *devices, *trainer, *place]
    assert (one.returncode, two.returncode, len(two.stdout.splitlines())) == (0, 0, 2)
    assert stubs.calls() == []  # a dry run calls nothing


def test_a_dry_run_of_0_is_none(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, DRY_RUN="0")
    assert bash(LOCAL, "--config", "a.py", env=env).returncode == 0
    assert len(stubs.calls("python")) == 1


def test_several_processes_know_one_coordinator_and_their_numbers(
    stubs: Stubs, tmp_path: Path
) -> None:
    _, env = started(stubs, tmp_path, "exit 0|exit 0|exit 0", PROCESSES="3", GPUS="2")
    assert bash(LOCAL, "--config", "a b.py", env=env).returncode == 0
    calls = [call for call in stubs.noted() if call["arguments"][0] == "-m"]
    calls.sort(key=lambda call: call["arguments"][-1])
    assert len({call["arguments"][5] for call in calls}) == 1
    host, port = calls[0]["arguments"][5].split(":")
    assert host == "127.0.0.1" and 1024 < int(port) < 65536
    for index, call in enumerate(calls):
        numbers = ["--coordinator", f"{host}:{port}", "--processes", "3", "--process", str(index)]
        assert call["arguments"] == ["-m", "jaxpeft.train", "--config", "a b.py", *numbers]
        assert call["environment"]["CUDA_VISIBLE_DEVICES"] == f"{2 * index},{2 * index + 1}"


CODES = {
    "both are done": ("exit 0|exit 0", 0),
    "bad input goes before all": ("exit 1|trap '' TERM; sleep 0.5; exit 2", 2),
    "bad input of the first": ("exit 2|stay", 2),
    "a failure while the other waits": ("stay|exit 3", 3),
    "a kill": ("stay|kill -9 $$", 137),
    "killed for not ending": ("stay|exit 143", 143),
    "a failure goes before a stop": ("exit 143|sleep 0.5; exit 1", 1),
    "one is stopped, the other saves too": ("exit 143|sleep 1; exit 143", 143),
    "one is done, the other still saves": ("exit 0|sleep 1; exit 0", 0),
}


@pytest.mark.parametrize(("do", "code"), CODES.values(), ids=list(CODES))
@pytest.mark.representatives(
    "one is stopped, the other saves too",
    "bad input of the first",
    "a failure goes before a stop",
    "both are done",
)
def test_exit_code(do: str, code: int, stubs: Stubs, tmp_path: Path) -> None:
    # who stays is killed after the grace; who saves ends within it
    _, env = started(stubs, tmp_path, do, PROCESSES="2", GRACE="1" if "stay" in do else "3")
    began = time.monotonic()
    assert bash(LOCAL, "--config", "a.py", env=env).returncode == code
    assert time.monotonic() - began < 8, "it waited for a process that it should have killed"


def test_who_is_saving_gets_no_second_signal(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, "exit 143|sleep 1; exit 143", PROCESSES="2")
    bash(LOCAL, "--config", "a.py", env=env)
    assert not (tmp_path / "term").exists()


def test_who_does_not_end_is_killed_after_the_grace(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, "exit 7|trap '' TERM; stay", PROCESSES="2", GRACE="1")
    began = time.monotonic()
    done = bash(LOCAL, "--config", "a.py", env=env)
    assert done.returncode == 7 and time.monotonic() - began < 8
    assert "process 0 of 2 exited with code 7; the other processes have 1 s to exit" in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_signal_is_passed_on(
    number: signal.Signals, code: int, processes: str, stubs: Stubs, tmp_path: Path
) -> None:
    do = "trap term INT; STOPPED=$((STOPPED_BY + 128)); stay|stay"
    _, env = started(stubs, tmp_path, do, PROCESSES=processes, STOPPED_BY=str(int(number)))
    assert signalled(LOCAL, env, number, tmp_path) == code
    assert lines(tmp_path / "term") == int(processes)


def signalled(script: Path, env: Mapping[str, str], number: signal.Signals, tmp_path: Path) -> int:
    # what runs in the background of a shell is started without SIGINT
    command = ["env", "--default-signal=INT", "bash", script, "--config", "a.py"]
    process = subprocess.Popen(command, env=env, cwd=ROOT, start_new_session=True)
    try:
        wait_until(lambda: lines(tmp_path / "started") == int(env["PROCESSES"]))
        time.sleep(0.2)
        process.send_signal(number)
        return process.wait(timeout=20)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("before", "after"),
    [("  trap 'pass_on 15' TERM\n", ""), ('kill -TERM "${pids[@]}"', 'kill -TERM "${pids[0]}"')],
    ids=["no trap", "process 0 alone"],
)
def test_a_script_that_passes_no_signal_on_would_be_noticed(
    before: str, after: str, stubs: Stubs, tmp_path: Path
) -> None:
    _, env = started(stubs, tmp_path, "stay|stay", PROCESSES="2", GRACE="1")
    signalled(mutated(LOCAL, before, after, tmp_path), env, signal.SIGTERM, tmp_path)
    assert lines(tmp_path / "term") < 2


def test_a_script_that_knows_no_bad_input_would_be_noticed(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, CODES["bad input goes before all"][0], PROCESSES="2")
    without = mutated(LOCAL, "code == 2 || ", "", tmp_path)
    assert bash(without, "--config", "a.py", env=env).returncode == 1


def lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_until(holds, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to it in time"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PROCESSES", "0"),
        ("PROCESSES", "two"),
        ("GRACE", "-1"),
        ("GRACE", "08"),
        ("DEVICES", "x"),
        ("GPUS", "0"),
        ("PORT", "x"),
    ],
)
def test_what_is_no_number_is_refused(
    variable: str, value: str, stubs: Stubs, tmp_path: Path
) -> None:
    _, env = started(stubs, tmp_path, **{variable: value})
    done = bash(LOCAL, "--config", "a.py", env=env)
    assert done.returncode == 2 and f"local.sh: {variable}={value}: is not a " in done.stderr
    assert stubs.calls("python") == []


def test_no_process_is_started_where_no_port_is_found(stubs: Stubs, tmp_path: Path) -> None:
    python = stubs.add("python", "exit 3")
    done = bash(LOCAL, "--config", "a.py", env=stubs.environment(PYTHON=str(python), PROCESSES="2"))
    assert done.returncode == 3 and len(stubs.calls("python")) == 1


def test_every_problem_is_said_at_once(stubs: Stubs, tmp_path: Path) -> None:
    _, env = started(stubs, tmp_path, PROCESSES="0", GRACE="-1", GPUS="none")
    done = bash(LOCAL, "--config", "a.py", env=env)
    assert [line.split(":")[1].strip() for line in done.stderr.splitlines()] == [
        "PROCESSES=0",
        "GRACE=-1",
        "GPUS=none",
    ]


# -------------------------------------------------------------------------------- without stand-ins


def real(**more: str) -> dict[str, str]:
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    return {
        **os.environ,
        **cache,
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "DEVICES": "2",
        **more,
    }


@pytest.fixture
def arguments(tiny_models: Mapping[str, Path], tmp_path: Path) -> list[str]:
    options = {"train__steps": 3, "mesh__data": -1, "log__tensorboard": False, "log__plot": False}
    rows = write_rows(tmp_path / "rows.jsonl", "single", 60)
    config = write_config(tmp_path / "mine.py", tiny_models["bert"], rows, **options)
    return ["--config", str(config), "--workdir", str(tmp_path / "run")]


@pytest.mark.slow
@pytest.mark.alternatives("1", "2")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_it_trains_and_goes_on(processes: str, arguments: list[str], tmp_path: Path) -> None:
    done = bash(LOCAL, *arguments, env=real(PROCESSES=processes))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    again = bash(LOCAL, *arguments, env=real(PROCESSES=processes))
    assert again.returncode == 0, again.stderr


@pytest.mark.parametrize("processes", ["1", "2"])
def test_bad_input_ends_with_2(processes: str, arguments: list[str]) -> None:
    done = bash(LOCAL, *arguments, "--config.train.batch_size=0", env=real(PROCESSES=processes))
    assert done.returncode == 2 and "train.batch_size" in done.stderr


@pytest.mark.slow
@pytest.mark.alternatives("1", "2")
@pytest.mark.parametrize("processes", ["1", "2"])
def test_sigterm_saves_and_ends_with_143(
    processes: str, arguments: list[str], tmp_path: Path
) -> None:
    many = [*arguments, "--config.train.steps=100000"]
    metrics = tmp_path / "run" / "metrics.jsonl"
    process = subprocess.Popen(
        ["bash", LOCAL, *many], env=real(PROCESSES=processes), cwd=ROOT, start_new_session=True
    )
    wait_until(lambda: lines(metrics) > 1, seconds=120)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143
    assert [
        path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdecimal()
    ]
