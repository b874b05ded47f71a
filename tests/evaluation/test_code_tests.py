"""Generated code runs in a limited process: what it must not do, it cannot."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxpeft.errors import ConfigError, DataError
from jaxpeft.evaluation import code_sandbox, code_tests
from jaxpeft.evaluation.code_tests import CodeLimits, CodeResult, find_code, program_of, run_program

QUICK = CodeLimits(seconds=2, memory=300 << 20, file_size=1 << 20)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux limits the process")


def namespaces_are_allowed() -> bool:
    found = shutil.which("unshare")
    if found is None:
        return False
    return subprocess.run([found, "-Urmn", "true"], capture_output=True).returncode == 0


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
    assert result.error.startswith("PermissionError")
    udp = "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM)"
    assert run_program(udp, QUICK).error.startswith("PermissionError")


@pytest.mark.parametrize(
    "call",
    [
        "os.chmod(FILE, 0o777)",
        "os.chown(FILE, 1, 1)",
        "os.setxattr(FILE, 'user.a', b'1')",
        "os.removexattr(FILE, 'user.a')",
        "os.utime(FILE, (1, 1))",
        "os.truncate(FILE, 0)",
        "fcntl.ioctl(open(os.__file__), 0x40086602, bytes(8))",  # flags of a file, as `chattr`
        "resource.prlimit(PARENT, resource.RLIMIT_CORE)",
        "os.kill(os.getppid(), 9)",
        "os.memfd_create('a')",
        "os.fork()",
        "os.setsid()",
    ],
)
def test_it_changes_no_metadata_and_no_process(tmp_path, call):
    file = tmp_path / "file"
    file.write_text("x")
    before = file.stat()
    head = f"import fcntl, os, resource; FILE, PARENT = {str(file)!r}, {os.getpid()}\n"
    assert "PermissionError: [Errno 1]" in run_program(head + call, QUICK).error
    assert file.stat() == before


def test_it_may_use_threads_timers_and_temporary_files():
    program = """
import asyncio, signal, tempfile, threading
found = []
thread = threading.Thread(target=found.append, args=(1,))
thread.start(), thread.join()
async def three(): return 3
with tempfile.TemporaryDirectory() as folder, open(folder + "/a", "w") as file:
    file.write("x")
signal.setitimer(signal.ITIMER_REAL, 60)
assert found == [1] and asyncio.run(three()) == 3
"""
    assert run_program(program, QUICK) == CodeResult(True)


@pytest.mark.skipif(not namespaces_are_allowed(), reason="the user may not create namespaces")
@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("for i in range(4): open(str(i), 'wb').write(bytes(1 << 20))", "OSError: [Errno 28]"),
        ("for i in range(30): open(str(i), 'w')", "OSError: [Errno 28]"),
        (
            "from threading import Event, Thread\nfor i in range(80): Thread(target=Event().wait).start()",
            "RuntimeError: can't start new thread",
        ),
    ],
    ids=["bytes", "files", "threads"],
)
def test_files_and_threads_are_limited_in_number(program, error):
    limits = CodeLimits(seconds=4, file_size=1 << 20, disk=3 << 20, files=20)
    assert run_program(program, limits).error.startswith(error)


@pytest.mark.parametrize(
    "written",
    [b"", b"limited\n", b'{"refused": "x"}', b'{"passed": true, "error": ""}', b"\xff" * (1 << 20)],
)
def test_what_a_program_writes_is_no_verdict(written):
    program = f"""
import os
for i in range(64):
    try: os.write(i, {written[:1]!r} * {len(written)} if {len(written)} > 99 else {written!r})
    except OSError: pass
os._exit(0)
"""
    assert not run_program(program, QUICK).passed


def test_no_frame_has_the_token():
    program = """
import os, re, sys
frame, found = sys._getframe(0), []
while frame:
    found += [str(value) for value in frame.f_locals.values()]
    frame = frame.f_back
raise ValueError([text for text in found if re.fullmatch("b?'?[0-9a-f]{64}'?", text)])
"""
    assert run_program(program, QUICK).error == "ValueError: []"


@pytest.mark.parametrize(
    ("report", "answer"),
    [
        (b"", {"passed": False, "error": "ends before its tests, or by a limit"}),
        (b"no Landlock\n", {"refused": "no Landlock"}),
        (b"limited\nsecret", {"passed": True, "error": ""}),
        (b"limited\nsecret\n", {"passed": False, "error": "secret\n"}),
        (b"limited\n\xff", {"passed": False, "error": "\ufffd"}),
    ],
)
def test_the_verdict_of_a_report(report, answer):
    assert code_sandbox._decide(report, b"secret") == answer


def test_it_sees_no_settings_of_its_parent(monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    assert run_program("import os; assert 'SECRET_OF_THE_PARENT' not in os.environ", QUICK).passed


def test_a_system_that_cannot_limit_it_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="this system cannot limit a program: Landlock is not"):
        code_tests._read(b'{"refused": "Landlock is not available"}', in_time=True, limits=QUICK)
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
