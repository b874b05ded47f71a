"""Generated code runs in a limited process: what it must not do, it cannot."""

from __future__ import annotations

import os
import socket
import sys
import time
from pathlib import Path

import pytest

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.evaluation import code_tests
from jaxpeft.evaluation.code_tests import CodeLimits, CodeResult, find_code, program_of, run_program

QUICK = CodeLimits(seconds=2, memory=300 << 20, file_size=1 << 20)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux limits the process")


def test_a_program_passes_if_it_runs_to_its_end():
    assert run_program("assert 1 + 1 == 2", QUICK).passed
    result = run_program("assert 1 + 1 == 3, 'no'", QUICK)
    assert (result.passed, result.error) == (False, "AssertionError: no")
    assert run_program("def f(:", QUICK).error.startswith("SyntaxError")


@pytest.mark.parametrize(
    "program",
    ["raise SystemExit(0)", "import os; os._exit(0)", "import os; os.write(1, b'{}'); os._exit(0)"],
)
def test_a_program_that_ends_early_does_not_pass(program):
    assert not run_program(program, QUICK).passed


def test_a_loop_is_ended():
    began = time.monotonic()
    assert run_program("while True: pass", CodeLimits(seconds=1)) == CodeResult(
        False, "takes more than 1 s"
    )
    assert time.monotonic() - began < 8


def test_memory_is_limited():
    assert run_program("x = bytearray(10**9)", QUICK).error.startswith("MemoryError")


def test_it_writes_in_its_folder_alone_which_is_removed(tmp_path):
    outside = tmp_path / "file"
    assert run_program(f"open({str(outside)!r}, 'w')", QUICK).error.startswith("PermissionError")
    assert not outside.exists()
    found = run_program(
        "import os; open('a', 'w').write('x'); raise ValueError(os.getcwd())", QUICK
    )
    folder = Path(found.error.removeprefix("ValueError: "))
    assert folder.is_absolute() and not folder.exists()


def test_files_are_limited_in_size():
    assert run_program("open('a', 'wb').write(b'x' * (2 << 20))", QUICK).error.startswith("OSError")


def test_it_reads_no_files_but_pythons(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    assert run_program(f"open({str(secret)!r})", QUICK).error.startswith("PermissionError")
    assert run_program("import decimal, sqlite3, random", QUICK).passed


def test_it_starts_no_program():
    error = run_program(f"import os; os.execv({sys.executable!r}, ['python'])", QUICK).error
    assert error.startswith("PermissionError")


def test_it_reaches_no_server():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        result = run_program(
            f"import socket; socket.create_connection(('127.0.0.1', {port}))", QUICK
        )
    assert not result.passed
    assert result.network in ("none", "no TCP")


def test_what_it_has_started_ends_with_it():
    program = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(60)"
    run_program(program, QUICK)
    children = Path("/proc/self/task") / str(os.getpid()) / "children"
    assert not children.is_file() or children.read_text().split() == _children(children)


def _children(file: Path) -> list[str]:
    """Return the children that are no sandbox."""
    return [
        child
        for child in file.read_text().split()
        if b"code_sandbox" not in Path("/proc", child, "cmdline").read_bytes()
    ]


def test_it_sees_no_settings_of_its_parent(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    assert run_program("import os; assert 'SECRET_OF_THE_PARENT' not in os.environ", QUICK).passed


def test_a_system_that_cannot_limit_it_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="this system cannot limit a program: Landlock is not"):
        code_tests._read(
            b'{"refused": "Landlock is not available"}', "t", in_time=True, limits=QUICK
        )
    monkeypatch.setattr(code_tests.sys, "platform", "darwin")
    with pytest.raises(
        ConfigError, match="--run-code: needs Linux to limit programs; this is darwin"
    ):
        run_program("pass")


def test_the_program_of_an_answer_and_of_a_continued_prompt():
    answer = "Here it is:\n```python\ndef f():\n    return 1\n```\nDone."
    assert find_code(answer) == "def f():\n    return 1\n"
    assert find_code("x = 1") == "x = 1"
    row = {"test_list": ["assert f() == 1", "assert f() < 2"]}
    program = program_of(row, "Write f.", answer, start="answer")
    assert run_program(program, QUICK).passed
    row = {"test": "def check(g):\n    assert g() == 1", "entry_point": "f"}
    program = program_of(row, "def f():\n", "    return 1", start="prompt")
    assert run_program(program, QUICK).passed
    assert not run_program(program.replace("return 1", "return 2"), QUICK).passed


def test_a_row_without_tests_is_refused():
    with pytest.raises(DataError, match="has no tests in column 'test or tests or test_list'"):
        program_of({"prompt": "x"}, "x", "y", start="answer")
    with pytest.raises(DataError, match=r"in column 'checks', but 3; name the column with --tests"):
        program_of({"checks": 3}, "x", "y", start="answer", column="checks")
