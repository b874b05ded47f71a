"""Process that runs one generated program, and ends with it.

The program comes from a language model, so it may do anything. It can write only in its temporary
folder, read only there and the files of Python, start no other program, and open no connection.
Time, memory, the size of files and their number are limited. Linux enforces this: Landlock for
files (https://docs.kernel.org/userspace-api/landlock.html), namespaces for the network and
processes where the user may create them, otherwise Landlock for TCP, and resource limits.

This is custom code because no maintained package limits a process in this way without installing a
program as root.

The file is run by path and imports nothing of jaxpeft. `code_tests.run_program` writes a line of
JSON to its standard input, `{"program", "folder", "token", "seconds", "memory", "file_size"}`. The
answer on its standard output is `{"token", "error", "network"}`, with the token only if the program
ran to its end; or `{"refused"}`, if the system cannot limit it.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

_NEW_USER, _NEW_NET, _NEW_PID, _NEW_IPC = 0x10000000, 0x40000000, 0x20000000, 0x08000000
_NO_NEW_PRIVILEGES, _DIE_WITH_PARENT, _SIGKILL = 38, 1, 9
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_READ = 1 << 2 | 1 << 3
_ACCESSES_BY_ABI = (0, 13, 14, 15, 15, 16)
"""Number of Landlock's file accesses, by its version; the last one for all newer versions."""
_EXECUTE, _IOCTL, _OF_FILES = 1, 1 << 15, 1 << 1 | 1 << 2
_OPEN_FILES, _GRACE = 64, 5
_LONGEST_ERROR = 300


class _Rules(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_uint64) for name in ("files", "network", "scope"))


class _Beneath(ctypes.Structure):
    _pack_ = 1
    _fields_ = (("access", ctypes.c_uint64), ("folder", ctypes.c_int32))


class _RefusedError(Exception):
    """The system cannot limit a program."""


def _library() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _call(number: int, *arguments: Any) -> int:
    result = _library().syscall(number, *arguments)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _landlock_version() -> int:
    try:
        return _call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError as error:
        raise _RefusedError(f"Landlock is not available ({error.strerror})") from error


def restrict_files(folder: str, readable: Iterable[str]) -> bool:
    """Limit this process to some files, forever; return whether TCP is forbidden too.

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
    _library().prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    _call(_RESTRICT_SELF, ruleset, ctypes.c_uint32(0))
    os.close(ruleset)
    return version >= 4


def _readable() -> list[str]:
    own = [sys.prefix, sys.base_prefix, *sys.path]
    return [*own, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/dev/null", "/dev/urandom"]


def _separate() -> bool:
    """Leave the network and the other processes; return whether the system allows it."""
    return _library().unshare(_NEW_USER | _NEW_NET | _NEW_PID | _NEW_IPC) == 0


def _limit(which: int, most: int) -> None:
    hard = resource.getrlimit(which)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(which, (most, most))


def _run(request: dict[str, Any], answer: int, separate: bool) -> None:
    _library().prctl(_DIE_WITH_PARENT, _SIGKILL, 0, 0, 0)
    no_tcp = restrict_files(request["folder"], _readable())
    network = "none" if separate else "no TCP" if no_tcp else "open"
    # in case nobody measures the time any more
    _limit(resource.RLIMIT_CPU, request["seconds"] + _GRACE)
    _limit(resource.RLIMIT_AS, request["memory"])
    _limit(resource.RLIMIT_FSIZE, request["file_size"])
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_NPROC, 0)
    _limit(resource.RLIMIT_CORE, 0)
    reply: dict[str, Any] = {"network": network}
    try:
        code = compile(request["program"], "program", "exec")
        exec(code, {"__name__": "__main__"})  # noqa: S102 - in this limited process
    except BaseException as error:  # noqa: BLE001 - a program may raise anything, even SystemExit
        reply["error"] = f"{type(error).__name__}: {error}"[:_LONGEST_ERROR]
    else:
        reply["token"] = request["token"]
    os.write(answer, json.dumps(reply).encode())
    os._exit(0)


def main() -> None:
    """Run the program of standard input in a child process, and wait for it."""
    request = json.loads(sys.stdin.read())
    answer = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    try:
        _landlock_version()
        separate = _separate()
    except _RefusedError as error:
        os.write(answer, json.dumps({"refused": str(error)}).encode())
        return
    child = os.fork()
    if child == 0:
        with suppress(BaseException):
            _run(request, answer, separate)
        os._exit(1)
    os.waitpid(child, 0)


if __name__ == "__main__":
    main()
