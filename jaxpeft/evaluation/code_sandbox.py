"""Process that runs one generated program, and ends with it.

The program comes from a language model, so it may do anything. It can write only in its temporary
folder, read only there and the files of Python, change no metadata of files, start no program and
no process, signal none, and open no connection. Time, memory, the size of files and their number
are limited. Linux enforces this: Landlock for files
(https://docs.kernel.org/userspace-api/landlock.html), a filter of system calls (`system_calls`),
resource limits, and, where the user may create them, namespaces, in which the folder is a small
file system in memory.

This is custom code because no maintained package limits a process in this way without installing a
program as root.

The file is run by path and imports nothing of jaxpeft. `code_tests.run_program` writes a line of
JSON to its standard input, `{"program", "folder", "filter", "seconds", "memory", "file_size",
"disk", "files"}`. The answer on its standard output is `{"passed", "error"}`; or `{"refused"}`, if
the system cannot limit a program; nothing if the program takes too long.

This process decides, and a child of it runs the program. The child says that it is limited before
the program starts. What passes is then proven with a random token that lies in a pipe, which the
child reads after the end of the program: the token is in no variable and no frame before, and a
wrong answer is a failure. Yet the program shares the process with its tests, so one that is written
against this file can read that pipe itself, or replace what the tests call. `passed` is therefore
no proof against a program that wants to cheat.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import secrets
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_NEW_USER, _NEW_NET, _NEW_PID, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
_NEW_MOUNTS = 0x00020000
_NO_SETUID_NO_DEVICES_NO_PROGRAMS = 2 | 4 | 8
_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT, _SIGKILL, _SECCOMP, _FILTER = 38, 1, 9, 22, 2
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ = 1 << 2 | 1 << 3
_ACCESSES_BY_ABI = (0, 13, 14, 15, 15, 16)
"""Number of Landlock's file accesses, by its version; the last one for all newer versions."""
_EXECUTE, _IOCTL, _OF_FILES = 1, 1 << 15, 1 << 1 | 1 << 2
_OPEN_FILES, _THREADS, _GRACE = 64, 64, 5
_LONGEST_ERROR = 300
_LONGEST_REPORT = 1 << 14
_LIMITED = b"limited"


class _Rules(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("files", "network", "scope"))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("folder", ctypes.c_int32))


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    result = _library().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _control(option: int, *values: Any) -> None:
    if _library().prctl(option, *values) != 0:
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")


def _landlock_version() -> int:
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError as error:
        raise OSError(error.errno, f"Landlock is not available ({error.strerror})") from error


def restrict_files(folder: str, readable: Iterable[str]) -> None:
    """Limit this process to some files, forever.

    Args:
        folder: folder that it may write in.
        readable: folders and files that it may read.
    """
    version = _landlock_version()
    every = (1 << _ACCESSES_BY_ABI[min(version, len(_ACCESSES_BY_ABI) - 1)]) - 1
    rules = _Rules(every, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(_CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), ctypes.c_uint32(0))
    allowed = [(folder, every & ~(_EXECUTE | _IOCTL)), *((path, _READ) for path in readable)]
    for path, access in allowed:
        if not Path(path).exists():
            continue
        opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = _Beneath(access if Path(path).is_dir() else access & _OF_FILES, opened)
        _call(_ADD_RULE, ruleset, 1, ctypes.byref(rule), ctypes.c_uint32(0))
        os.close(opened)
    _control(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)


def restrict_calls(steps: bytes) -> None:
    """Limit the system calls of this process, which can get no privileges, forever.

    Args:
        steps: instructions of a filter.
    """
    rules = _Filter(len(steps) // 8, steps)
    _control(_SECCOMP, _FILTER, ctypes.byref(rules), 0, 0)


def _readable() -> list[str]:
    own = [sys.prefix, sys.base_prefix, *sys.path]
    return [*own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom"]


def _separate(folder: str, disk: int, files: int) -> bool:
    """Leave the network, the other processes and the disk; return whether the system allows it.

    Args:
        folder: folder that becomes a file system in memory.
        disk: its size in bytes.
        files: its maximum number of files.
    """
    own = {"uid": os.getuid(), "gid": os.getgid()}
    if _library().unshare(_NEW_USER | _NEW_MOUNTS | _NEW_NET | _NEW_PID | _NEW_IPC) != 0:
        return False
    try:
        Path("/proc/self/setgroups").write_text("deny", "ascii")
        for kind, number in own.items():
            Path(f"/proc/self/{kind}_map").write_text(f"{number} {number} 1", "ascii")
    except OSError:  # of a system that gives such a user no rights
        return False
    options = f"size={disk},nr_inodes={files},mode=700".encode()
    flags = ctypes.c_ulong(_NO_SETUID_NO_DEVICES_NO_PROGRAMS)
    if _library().mount(b"none", os.fsencode(folder), b"tmpfs", flags, options) != 0:
        return False
    os.chdir(folder)
    return True


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def _restrict(request: dict[str, Any], *, separate: bool) -> None:
    """Limit this process.

    Raises:
        OSError: The system cannot do it.
    """
    _control(_DIE_WITH_PARENT, _SIGKILL, 0, 0, 0)
    restrict_files(request["folder"], _readable())
    # in case nobody measures the time any more
    _limit(resource.RLIMIT_CPU, request["seconds"] + _GRACE)
    _limit(resource.RLIMIT_AS, request["memory"])
    _limit(resource.RLIMIT_FSIZE, request["file_size"])
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)
    if separate:  # otherwise all processes of the user count
        _limit(resource.RLIMIT_NPROC, _THREADS)
    restrict_calls(bytes.fromhex(request["filter"]))


def _run(program: str, proof: int, report: int) -> None:
    """Run a program, and report its error or the proof of its end.

    Args:
        program: Python code.
        proof: pipe that has the token.
        report: pipe of the report.
    """
    try:
        code = compile(program, "program", "exec")
        exec(code, {"__name__": "__main__"})  # noqa: S102 - in this limited process
    except BaseException as error:  # noqa: BLE001 - a program may raise anything, even SystemExit
        text = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR].encode(errors="replace")
    else:
        text = os.read(proof, _LONGEST_REPORT)
    os.write(report, text)


def _become_child(request: dict[str, Any], proof: int, report: int, *, separate: bool) -> None:
    """Limit this process, say so, run the program, and end."""
    with suppress(BaseException):
        try:
            _restrict(request, separate=separate)
        except OSError as error:
            os.write(report, f"{error.strerror}\n".encode())
            os._exit(1)
        os.write(report, _LIMITED + b"\n")
        _run(request["program"], proof, report)
    os._exit(0)


def _read_all(pipe: int) -> bytes:
    """Return what comes from a pipe, at most a report, until the other side has ended."""
    found = b""
    while len(found) < _LONGEST_REPORT and (part := os.read(pipe, _LONGEST_REPORT)):
        found += part
    return found


def _decide(report: bytes, token: bytes) -> dict[str, Any]:
    """Return the answer for a report: only its first line comes before the program."""
    first, _, rest = report.partition(b"\n")
    if first and first != _LIMITED:
        return {"refused": first.decode(errors="replace")}
    if rest and secrets.compare_digest(rest, token):
        return {"passed": True, "error": ""}
    text = rest.decode(errors="replace")[:_LONGEST_ERROR]
    return {"passed": False, "error": text or "ends before its tests, or by a limit"}


def main() -> None:
    """Run the program of standard input in a child process, and answer whether it passes."""
    request = json.loads(sys.stdin.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    separate = _separate(request["folder"], request["disk"], request["files"])
    proof, prove = os.pipe()
    reports, report = os.pipe()
    child = os.fork()
    if child == 0:
        for pipe in (answer, prove, reports):
            os.close(pipe)
        _become_child(request, proof, report, separate=separate)
    for pipe in (proof, report):
        os.close(pipe)
    token = secrets.token_hex().encode()
    with suppress(BrokenPipeError):  # of a child that has ended
        os.write(prove, token)
    os.close(prove)
    os.write(answer, json.dumps(_decide(_read_all(reports), token)).encode())


if __name__ == "__main__":
    main()
