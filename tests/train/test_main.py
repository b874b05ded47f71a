"""The command line: every problem at once, exit codes, early and without JAX; signals save."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from jaxpeft.command.parser import read_arguments
from jaxpeft.train import __main__ as train
from jaxpeft.train.arguments import RunArguments, job_of
from tests.conftest import ROOT
from tests.train.runs import tiny_models, write_config, write_rows

__all__ = ["tiny_models"]


def run(*arguments: str, wrapper: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command; `wrapper` is Python to run in its place."""
    command = (
        [sys.executable, "-m", "jaxpeft.train"]
        if wrapper is None
        else [sys.executable, "-c", wrapper]
    )
    return subprocess.run(
        [*command, *arguments], capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture
def config_file(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Path:
    file = tmp_path / "mine.py"
    rows = write_rows(tmp_path / "rows.jsonl", "single", 100)
    return write_config(file, tiny_models["bert"], rows, train__steps=400, log__every_steps=1)


WRONG = (
    "--config.train.batchsize=8",
    "--config.optimizer.learning_rate=fast",
    "--config.method.rank=0",
    "--config.train.epochs=3",
    "--config.method.dropout=1.5",
    "--config.model.task=classify",
)


def processor_seconds() -> float:
    """Return the processor time of the programs that were started and have ended: unlike the time
    on the clock, it does not depend on what else the machine does.
    """
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_every_problem_at_once_with_exit_code_2_in_two_seconds_and_without_jax(
    config_file: Path,
) -> None:
    check = (
        "import sys; from jaxpeft.train.__main__ import main; code = main(sys.argv[1:]); "
        "loaded = [m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules]; "
        "print('LOADED', loaded); sys.exit(code)"
    )
    before = processor_seconds()
    done = run("--config", str(config_file), *WRONG, wrapper=check)
    seconds = processor_seconds() - before
    assert done.returncode == 2
    assert "LOADED []" in done.stdout
    for text in (
        "6 problems",
        "config.train.batchsize: no such option; did you mean",
        "config.optimizer.learning_rate: must be a number, is 'fast' (str)",
        "config.method.rank: must be at least 1, is 0",
        "config.train.steps: 400 and epochs 3.0 cannot both be set",
        "config.method.dropout: must be below 1, is 1.5",
        "config.model.task: must be one of",
    ):
        assert text in done.stderr, text
    assert "Traceback" not in done.stderr
    assert seconds < 2, seconds


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "--config: is not given; try --config configs/quickstart.py"),
        (("--config", "configs/quikstart.py"), "no such file; did you mean configs/quickstart.py"),
        (("--confg", "x.py"), "--confg: no such option; did you mean '--config'"),
        (("--config", "configs/quickstart.py", "stray"), "'stray': not an option"),
        (
            ("--config", "configs/quickstart.py", "--config.method.name=lorra"),
            "'lorra' is not a method; did you mean",
        ),
        (
            ("--config", "configs/quickstart.py", "--workdir", "/proc/nowhere"),
            "--workdir /proc/nowhere: cannot be",
        ),
        (("--config", "configs/quickstart.py", "--config.model"), "config.model"),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert train.main(list(arguments)) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("def get_config(:\n", ":1: SyntaxError"),
        ("import nothing_like_it\n", ":1: ModuleNotFoundError"),
        ("x = 1\n", "get_config"),
        ("def get_config():\n    return 3\n", "must return a ConfigDict, returns a int"),
        (
            (
                "from jaxpeft.config import defaults\ndef get_config():\n    c = defaults()\n   "
                " c.trian.steps = 3\n    return c\n"
            ),
            ":4: AttributeError",
        ),
    ],
)
def test_a_broken_config_file_is_named_with_the_line(
    content: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text(content)
    assert train.main(["--config", str(tmp_path / "broken.py")]) == 2
    assert f"{tmp_path}/broken.py" in (error := capsys.readouterr().err)
    assert text in error


def test_overrides_are_read_as_their_options_types(config_file: Path, tmp_path: Path) -> None:
    arguments = [
        "--config",
        str(config_file),
        "--workdir",
        str(tmp_path / "run"),
        "--config.optimizer.learning_rate=1e-3",
        "--config.method.targets=query,value",
        "--config.optimizer.clip_norm",
        "None",
        "--config.method.rslora=true",
        "--config.method.rank_pattern={'query': 2}",
        "--config.data.lengths=8,16",
        "--config.compare.seeds=4",
        "--config.data.train=/a/b.jsonl,~/c.csv,org/name",
    ]
    job = job_of(*read_arguments(RunArguments, arguments))
    config = job.config
    assert job.workdir == tmp_path / "run"
    assert config.optimizer.learning_rate == 1e-3
    assert config.optimizer.clip_norm is None
    assert config.method.targets == ("query", "value")  # type: ignore[attr-defined]
    assert config.method.rslora is True  # type: ignore[attr-defined]
    assert config.method.rank_pattern == {"query": 2}  # type: ignore[attr-defined]
    assert config.data.lengths == (8, 16)
    assert config.compare.seeds == (4,)
    assert config.data.train == ("/a/b.jsonl", "~/c.csv", "org/name")


def test_another_method_on_the_command_line_takes_its_own_options(config_file: Path) -> None:
    job = job_of(
        *read_arguments(RunArguments, ["--config", str(config_file), "--config.method.name=full"])
    )
    assert job.config.method.name == "full"


def test_validate_stops_after_the_check(config_file: Path, tmp_path: Path) -> None:
    done = run("--config", str(config_file), "--workdir", str(tmp_path / "run"), "--validate")
    assert done.returncode == 0
    assert "mine.py is valid" in done.stderr
    assert not (tmp_path / "run").exists()


def test_missing_rows_are_told_in_one_line_and_a_traceback_only_if_asked(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(config_file),
        "--workdir",
        str(tmp_path / "run"),
        "--config.data.train=gone.jsonl",
    ]
    assert train.main(arguments) == 2
    told = capsys.readouterr().err
    assert "gone.jsonl" in told
    assert "Traceback" not in told
    assert train.main([*arguments, "--traceback"]) == 2
    asked = capsys.readouterr().err
    assert "Traceback" in asked
    assert asked.endswith(told)


def stopped_by(signum: int, config_file: Path, workdir: Path) -> subprocess.Popen[str]:
    """Run until a few steps are done, and sends the signal."""
    command = [
        sys.executable,
        "-m",
        "jaxpeft.train",
        "--config",
        str(config_file),
        "--workdir",
        str(workdir),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if "step 20/" in line:
            os.kill(process.pid, signum)
            break
    return process


def test_help_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "--config configs/NAME.py" in shown
    assert "--workdir" in shown


def test_a_bad_folder_is_told_beside_a_bad_config(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--config",
        str(config_file),
        "--workdir",
        "/proc/nowhere",
        "--config.method.rank=0",
    ]
    assert train.main(arguments) == 2
    shown = capsys.readouterr().err
    assert "2 problems" in shown
    assert "config.method.rank: must be at least 1" in shown
    assert "--workdir /proc/nowhere: cannot be written" in shown


def test_a_signal_while_python_still_imports_ends_with_143(
    config_file: Path, tmp_path: Path
) -> None:
    early = (
        "import os, signal, sys, builtins; real = builtins.__import__\n"
        "def slow(name, *args, **kw):\n"
        "    if name == 'jaxpeft.train.job': os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(name, *args, **kw)\n"
        "builtins.__import__ = slow\n"
        "from jaxpeft.train.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = run("--config", str(config_file), "--workdir", str(tmp_path / "run"), wrapper=early)
    assert done.returncode == 143, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "allowed"),
    [
        ([], []),
        (["--allow-base"], ["base"]),
        (["--allow_base", "--allow-change=data"], ["data", "base"]),
    ],
)
def test_allow_base_allows_the_fields_of_the_base(tmp_path, words, allowed):
    got: list[train.Job] = []
    argv = ["--config", "configs/quickstart.py", "--workdir", str(tmp_path), *words]
    assert train.run_job(argv, None, lambda job: got.append(job) or 0) == 0
    assert sorted(got[0].allowed) == sorted(allowed)
