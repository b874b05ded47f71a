"""Generated code that must pass its tests, as in HumanEval (Chen et al. 2021, arXiv:2107.03374).

It runs only in a limited process: see `code_sandbox`, which also says what a result cannot prove.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.evaluation import code_sandbox
from jaxpeft.evaluation.system_calls import filter_calls

TESTS = ("test", "tests", "test_list")
"""Usual columns of tests: Python code, or a list of statements."""
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)
_SETTINGS = {"PATH": "", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


@dataclass(frozen=True)
class CodeLimits:
    """Limits of a program.

    Attributes:
        seconds: time.
        memory: address space in bytes.
        file_size: size of a file that it writes, in bytes.
        disk: size of all its files, in bytes, where the user may create namespaces.
        files: their number, likewise.
    """

    seconds: int = 10
    memory: int = 1 << 30
    file_size: int = 16 << 20
    disk: int = 64 << 20
    files: int = 1000


@dataclass(frozen=True)
class CodeResult:
    """The end of a program.

    Attributes:
        passed: whether it ran to its end.
        error: why not; empty if it passed.
    """

    passed: bool
    error: str = ""


def run_program(program: str, limits: CodeLimits = CodeLimits()) -> CodeResult:
    """Run a program in a limited process.

    Args:
        program: Python code.
        limits: its limits.

    Raises:
        ConfigError: The system cannot limit a process.
    """
    if sys.platform != "linux":
        raise ConfigError(f"--run-code: needs Linux to limit programs; this is {sys.platform}")
    steps = filter_calls(platform.machine())
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as request,
        tempfile.TemporaryFile() as answer,
    ):
        content = {"program": program, "folder": folder, "filter": steps.hex(), **vars(limits)}
        request.write(json.dumps(content).encode())
        request.seek(0)
        process = subprocess.Popen(  # noqa: S603 - this Python, and a file of jaxpeft
            [sys.executable, "-I", "-B", code_sandbox.__file__],
            stdin=request,
            stdout=answer,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={**_SETTINGS, "HOME": folder, "TMPDIR": folder},
            start_new_session=True,
        )
        in_time = _wait(process, limits.seconds)
        answer.seek(0)
        return _read(answer.read(1 << 16), in_time=in_time, limits=limits)


def _wait(process: subprocess.Popen[bytes], seconds: int) -> bool:
    """Wait for a process and end what it has started; return whether it ended in time."""
    try:
        process.wait(seconds + 1)
    except subprocess.TimeoutExpired:
        return False
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return True


def _read(answer: bytes, *, in_time: bool, limits: CodeLimits) -> CodeResult:
    try:
        reply: Any = json.loads(answer)
    except ValueError:
        reply = None
    if not isinstance(reply, Mapping):
        why = (
            "ends before its tests, or by a limit"
            if in_time
            else f"takes more than {limits.seconds} s"
        )
        return CodeResult(False, why)
    if "refused" in reply:
        raise ConfigError(
            f"--run-code: this system cannot limit a program: {reply['refused']}; use Linux 5.13 or"
            " newer with Landlock enabled, or leave the option out"
        )
    return CodeResult(reply["passed"] is True, str(reply["error"]))


def find_code(text: str) -> str:
    """Return the first fenced block of code of a text, or the text itself."""
    found = _FENCED.search(text)
    return found.group(1) if found else text


def row_tests(record: Mapping[str, Any], column: str | None = None) -> str:
    """Return the tests of a row.

    Args:
        record: the row.
        column: column of the tests; None for a usual one.

    Raises:
        DataError: The row has no tests.
    """
    name = column or next((name for name in TESTS if record.get(name)), None)
    tests: Any = record.get(name) if name else None
    if isinstance(tests, list) and all(isinstance(line, str) for line in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str) or not tests.strip():
        raise DataError(
            f"--run-code: a row has no tests in column {name or ' or '.join(TESTS)!r}, but"
            f" {show(tests)}; name the column with --tests"
        )
    return tests


def program_of(
    record: Mapping[str, Any],
    prompt: str,
    text: str,
    *,
    start: Literal["answer", "prompt"],
    column: str | None = None,
) -> str:
    """Return the program of a generated text and the tests of its row.

    Args:
        record: the row; `entry_point` names the function that `check` receives, as in HumanEval.
        prompt: text of the prompt.
        text: the generated text; of a text with fenced code, the first block.
        start: whether the program starts with the answer, or the answer continues the prompt.
        column: column of the tests; None for a usual one.

    Raises:
        DataError: The row has no tests.
    """
    tests = row_tests(record, column)
    entry = record.get("entry_point")
    check = f"check({entry})" if isinstance(entry, str) and entry.isidentifier() else ""
    head = prompt if start == "prompt" else ""
    return "\n".join([head + (text if head else find_code(text)), tests, check])
