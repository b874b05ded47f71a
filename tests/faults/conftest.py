"""What the fault tests share: a short run with a fault in it, the run that nothing happened to, and
the four marks.

The name of a test says which case of `cases.py` it shows: `test_case_12_...`. The fixture `marks`
checks, and notes what it has checked: `python -m tests.faults.report` makes docs/reliability.md of
it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from jaxpeft import logs
from tests.faults.cases import CASES
from tests.train.runs import tiny_models, write_config, write_rows

__all__ = ["tiny_models"]
ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / ".pytest_cache" / "programs"
"""The compiled programs of all runs, most of which are the same."""
STEPS = 8
MOST_LINES = 5
IN_TIME = 60.0
OPTIONS = {
    "method__dropout": 0.1,
    "train__steps": STEPS,
    "evaluation__every_steps": 3,
    "checkpoint__every_steps": 2,
    "log__tensorboard": False,
    "log__plot": False,
}
OPTIONS_OFF = {name: value for name, value in OPTIONS.items() if name.startswith("log__")}
CHAT = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}"
GOOD = [{"role": "user", "content": "word1 word2"}, {"role": "assistant", "content": "word3"}]
"""A chat that can be trained on."""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    returncode: int
    stderr: str
    seconds: float

    @property
    def error(self) -> str:
        """What it complained of at the end."""
        at = self.stderr.rfind("jaxpeft: ")
        return self.stderr[at:] if at >= 0 else ""


class Marks:
    """Checks one test's four marks, and notes each."""

    def __init__(self, node: pytest.Item) -> None:
        self._node = node

    def _note(self, mark: str) -> None:
        self._node.user_properties.append(("mark", mark))

    def exit(self, done: Done, code: int) -> None:
        """C: the exit code."""
        assert done.returncode == code, done.stderr
        self._note("C")

    def message(self, done: Done, *texts: str, most: int = MOST_LINES) -> None:
        """M: what is said; of an error at most so many lines, and no traceback."""
        for text in texts:
            assert text in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
        lines = done.error.strip().splitlines()
        assert len(lines) <= most, done.error
        assert not lines or not re.match(r"(\w+\.)+\w*(Error|Exception)\b", lines[-1]), done.error
        self._note("M")

    def early(self, done: Done) -> None:
        """T, of a refusal: before anything is compiled."""
        assert "compiling the" not in done.stderr
        self.in_time(done)

    def in_time(self, done: Done) -> None:
        """T: in the time that the case allows."""
        assert done.seconds < IN_TIME
        self._note("T")

    def kept(self, before: Mapping[str, bytes], after: Mapping[str, bytes]) -> None:
        """L: every file that was there is there, byte for byte."""
        assert {name: after.get(name) == data for name, data in before.items()} == dict.fromkeys(
            before, True
        )
        self._note("L")

    def same_end(self, job: Job, whole: Job) -> None:
        """L: the run has ended as the one that nothing happened to."""
        assert job.digest() == whole.digest()
        self._note("L")


@pytest.fixture
def marks(request: pytest.FixtureRequest) -> Marks:
    """Check that are noted for the table."""
    named = re.match(r"test_case_(\d+)_", request.node.name)
    assert named and int(named[1]) in CASES, "name the test test_case_NUMBER_..."
    request.node.user_properties.append(("case", int(named[1])))
    return Marks(request.node)


def files(folder: Path, names: Sequence[str] = ("*",)) -> dict[str, bytes]:
    """Read every file below a folder."""
    found = (path for name in names for path in folder.rglob(name))
    return {str(path.relative_to(folder)): path.read_bytes() for path in found if path.is_file()}


@functools.cache
def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.faults.preload"])
    return context


def run(arguments: list[str], fault: str | None, said: str, cache: str) -> None:
    """Run the main job in a process forked for it."""
    with open(said, "w") as file:  # noqa: PTH123
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import jax

    from jaxpeft.train.__main__ import main
    from tests.faults import entry

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(entry.main([fault, "--", *arguments]) if fault else main(arguments))


def command(words: Sequence[str]) -> Done:
    """Run Python, in the folder of the project."""
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=600, check=False, cwd=ROOT
    )
    return Done(done.returncode, done.stderr, time.perf_counter() - began)


def here(*arguments: str) -> Done:
    """Run the main job in this process: for what is refused, where starting another would take the
    time.
    """
    from jaxpeft.train.__main__ import main

    return told(lambda: main(list(arguments)))


def library(call: Callable[[], Any]) -> Done:
    """Call the library, and tell what it raises as every command of jaxpeft does."""
    from jaxpeft.processes.exit_codes import run_guarded

    return told(lambda: run_guarded(lambda: (call(), 0)[1], show_traceback=False))


def told(body: Callable[[], int]) -> Done:
    """Return what a command says in this process."""
    said, logger, handler = io.StringIO(), logging.getLogger("jaxpeft"), logs.StderrHandler()
    handlers, level = logger.handlers[:], logger.level
    logger.handlers, began = [handler], time.perf_counter()
    try:
        with contextlib.redirect_stderr(said):
            code = body()
    finally:
        logger.handlers, _ = handlers, logger.setLevel(level)
    return Done(code, said.getvalue(), time.perf_counter() - began)


@dataclass(frozen=True)
class Job:
    """The command of one run."""

    config: Path
    workdir: Path

    def __call__(
        self, *arguments: str, fault: str | None = None, kill_after: float | None = None
    ) -> Done:
        """Run it in a process of its own, with a fault or without.

        Args:
            arguments: more of them.
            fault: at a named point, see `entry`.
            kill_after: seconds until it is killed, wherever it is then.
        """
        said = self.config.parent / f"said-{os.getpid()}.txt"
        given = ["--config", str(self.config), "--workdir", str(self.workdir), *arguments]
        process = _context().Process(target=run, args=(given, fault, str(said), str(PROGRAMS)))
        began = time.perf_counter()
        process.start()
        process.join(kill_after or 600)
        if process.is_alive():
            process.kill()
            process.join()
        seconds, code = time.perf_counter() - began, process.exitcode
        assert code is not None
        return Done(code, said.read_text() if said.exists() else "", seconds)

    def command(self, *arguments: str, fault: str | None = None) -> Done:
        """Run it as a person does: the whole command, from the start of Python to its end."""
        words = ["-m", "tests.faults.entry", fault, "--"] if fault else ["-m", "jaxpeft.train"]
        words += ["--config", str(self.config), "--workdir", str(self.workdir), *arguments]
        return command(words)

    def here(self, *arguments: str) -> Done:
        """Run it in this process."""
        return here("--config", str(self.config), "--workdir", str(self.workdir), *arguments)

    def at(self, workdir: Path) -> Job:
        """Return the same command in another folder."""
        return Job(self.config, workdir)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.workdir / "checkpoints"

    @property
    def steps(self) -> list[int]:
        """The steps that there are folders of."""
        return sorted(
            int(path.name) for path in self.checkpoints.iterdir() if path.name.isdecimal()
        )

    def digest(self) -> str:
        """Return the hash of the adapter that the run has saved."""
        tensors = load_file(self.workdir / "adapter" / "adapter_model.safetensors")
        return hashlib.sha256(
            b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))
        ).hexdigest()


@pytest.fixture
def chats(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Callable[..., Job]:
    """Make a run of chats: lists of messages, and a template; further options as for
    `write_config`.
    """

    def make(
        rows: Sequence[Sequence[Mapping[str, Any]]], template: str = CHAT, **options: Any
    ) -> Job:
        file, jinja = tmp_path / "rows.jsonl", tmp_path / "mine.jinja"
        file.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        jinja.write_text(template)
        given = {
            "model__task": "causal_lm",
            "data__chat_template": str(jinja),
            "data__max_length": 32,
            "train__steps": 2,
        }
        config = write_config(
            tmp_path / "chats.py", tiny_models["llama"], file, **given | OPTIONS_OFF | options
        )
        return Job(config, tmp_path / "run")

    return make


@pytest.fixture
def job(tmp_path: Path, written: Path) -> Job:
    """A run in a folder of its own."""
    return Job(written, tmp_path / "run")


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_models: Mapping[str, Path]) -> Path:
    """The config of a run."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(folder / "rows.jsonl", "single", 60)
    return write_config(folder / "mine.py", tiny_models["bert"], rows, **OPTIONS)


@pytest.fixture(scope="session")
def whole(written: Path) -> Job:
    """The run that nothing happened to."""
    made = Job(written, written.parent / "run")
    done = made()
    assert done.returncode == 0, done.stderr
    return made


def cut_short(job: Job, whole: Job) -> int:
    """Copy the run that nothing happened to, as if it had been killed after its last step but one
    that was saved; return that step.
    """
    shutil.copytree(whole.workdir, job.workdir)
    shutil.rmtree(job.workdir / "adapter")
    shutil.rmtree(job.checkpoints / str(job.steps[-1]))
    return job.steps[-1]


def damage(file: Path, how: str) -> None:
    """Flips a bit in the middle of a file, cuts it, or removes it."""
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def largest(folder: Path) -> Path:
    """Return the largest file below a folder: that of the arrays."""
    return max(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size
    )
