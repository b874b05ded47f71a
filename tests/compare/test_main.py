"""The command that compares: what it refuses, and that it goes on where it was killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from jaxpeft.command.parser import read_arguments
from jaxpeft.compare import __main__ as compare
from jaxpeft.train import __main__ as train
from jaxpeft.train.arguments import RunArguments, job_of
from tests.conftest import CACHE
from tests.train.runs import tiny_models, write_config, write_rows

__all__ = ["tiny_models"]
CANDIDATES = (
    {"method": {"name": "lora", "rank": 2}, "learning_rate": 1e-2},
    {
        "name": "none",
        "method": {"name": "lora", "targets": ["no_such"]},
    },  # is valid, and fails on any model
)
IN_TIME = 240.0


@pytest.fixture
def config_file(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Path:
    rows = write_rows(tmp_path / "rows.jsonl", "single", 60)
    options = {
        "train__steps": 30,
        "checkpoint__every_steps": 10,
        "log__every_steps": 1,
        "log__tensorboard": False,
    }
    return write_config(
        tmp_path / "mine.py",
        tiny_models["bert"],
        rows,
        compare__candidates=CANDIDATES,
        compare__seeds=(0, 1),
        **options,
    )


def begun(config: Path, workdir: Path) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-m",
        "jaxpeft.compare",
        "--config",
        str(config),
        "--workdir",
        str(workdir),
    ]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(CACHE / "jax"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | cache)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + IN_TIME
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_killed_and_given_again_it_goes_on_repeats_nothing_and_tells_what_fails(
    config_file: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    first, second = (workdir / "lora" / seed for seed in ("seed-0", "seed-1"))
    process = begun(config_file, workdir)
    with process:
        until(lambda: (first / "result.json").is_file() and "step 5/" in _text(second / "log.txt"))
        process.kill()
    until(lambda: "is saved, the same command resumes from it" in _text(second / "log.txt"))
    until(lambda: not (second / ".lock").exists())
    assert not (second / "result.json").exists()
    kept = (first / "result.json").stat().st_mtime_ns

    process = begun(config_file, workdir)
    said = process.communicate(timeout=IN_TIME)[1]
    assert process.returncode == 1, said
    assert (first / "result.json").stat().st_mtime_ns == kept
    assert "4 runs: 2 candidates, 2 seeds; 1 done" in said
    assert "restoring step" in _text(second / "log.txt")
    assert "2 runs failed:\n  none, seed 0: config.method.targets: 'no_such'" in said
    made = json.loads((workdir / "comparison.json").read_text())
    assert {name: one["runs"] for name, one in made["candidates"].items()} == {"lora": 2, "none": 0}
    assert 0 < made["candidates"]["lora"]["trainable_share"] < 1
    assert (workdir / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "| none (0 of 2 runs) |" in (workdir / "comparison.md").read_text()


@pytest.mark.slow
def test_a_signal_saves_the_run_that_is_going_on_and_ends_with_its_code(
    config_file: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    process = begun(config_file, workdir)
    until(lambda: "step 5/" in _text(workdir / "lora" / "seed-0" / "log.txt"))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=IN_TIME)[1]
    assert process.returncode == 130, said
    assert "is saved, the same command resumes from it" in said
    assert "stopped on request; the same command resumes the comparison" in said
    assert "Traceback" not in said
    assert list((workdir / "lora" / "seed-0" / "checkpoints").iterdir())


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def test_it_is_checked_without_jax(config_file: Path) -> None:
    check = (
        "import sys; from jaxpeft.compare.__main__ import main; import jaxpeft.compare.runs; code ="
        " main(sys.argv[1:]); loaded = [m for m in ('jax', 'flax', 'torch', 'matplotlib') if m in"
        " sys.modules]; print('LOADED', loaded); sys.exit(code)"
    )
    words = ["--config", str(config_file), "--config.compare.seeds=0,0", "--config.train.steps=0"]
    done = subprocess.run(
        [sys.executable, "-c", check, *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "LOADED []" in done.stdout
    assert "2 problems" in done.stderr
    assert "config.compare.seeds: lists 0 2 times" in done.stderr


def test_each_verb_refuses_the_others_config(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(config_file), "--workdir", str(tmp_path / "run")]
    assert train.main(words) == 2
    assert (
        "config.compare.candidates: lists 2 methods to compare; run `python -m jaxpeft.compare --config"
        in capsys.readouterr().err
    )
    assert train.main([*words, "--config.compare.candidates=()", "--validate"]) == 0
    assert compare.main([*words, "--config.compare.candidates=()"]) == 2
    assert (
        "config.compare.candidates: is empty; list the methods to compare"
        in capsys.readouterr().err
    )
    assert compare.main([*words, "--validate"]) == 0


def test_a_comparison_of_the_configs_own_method_is_trained_without_the_others(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "--config",
        str(config_file),
        "--workdir",
        str(tmp_path / "run"),
        "--config.method.rank=3",
    ]
    own = "--config.compare.candidates={'method': {'name': 'head'}}, {}"
    given, overrides = read_arguments(RunArguments, [*words, own])
    config = job_of(given, overrides).config
    assert config.compare.candidates == ()
    assert config.method.as_dict()["rank"] == 3
    config = job_of(given, overrides, compares=True).config
    assert config.compare.titles == ("head", "lora")
    assert config.compare.candidates[1].method.as_dict()["rank"] == 3
    assert train.main([*words, own, "--config.log.wandb=mine", "--validate"]) == 0
    assert compare.main([*words, own, "--config.log.wandb=mine", "--validate"]) == 2
    assert (
        "config.log.wandb: all runs of a comparison would have the same name there"
        in capsys.readouterr().err
    )


def test_help_says_what_is_left_behind(capsys: pytest.CaptureFixture[str]) -> None:
    assert compare.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for text in ("python -m jaxpeft.compare", "comparison.md", "--workdir"):
        assert text in shown
