"""The filter of system calls, of each machine, as an interpreter of its instructions sees it."""

from __future__ import annotations

import struct

import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.evaluation.system_calls import filter_calls

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026


def result(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """Return the result of a filter for a system call, as the kernel computes it."""
    given = MACHINES[machine] if architecture is None else architecture
    padded = [*arguments, *(0,) * (6 - len(arguments))]
    data = struct.pack("<IIQ6Q", number, given, 0, *padded)
    steps, at, value = list(struct.iter_unpack("<HBBI", filter_calls(machine))), 0, 0
    while True:
        code, yes, no, wanted = steps[at]
        if code == 0x06:
            return wanted
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, wanted)
            at += 1
            continue
        tests = {0x15: value == wanted, 0x35: value >= wanted, 0x45: bool(value & wanted)}
        at += 1 + (yes if tests[code] else no)


@pytest.mark.parametrize(
    ("machine", "allowed", "denied"),
    [
        # read, write, openat, mmap, futex, exit_group, socketpair; chmod or fchmodat, ...
        ("x86_64", (0, 1, 257, 9, 202, 231, 53), (90, 268, 188, 280, 57, 59, 41, 62, 112)),
        ("aarch64", (63, 64, 56, 222, 98, 94, 199), (53, 54, 5, 88, 221, 198, 129, 157)),
    ],
)
def test_calls_by_number(machine, allowed, denied):
    assert {result(machine, number) for number in allowed} == {ALLOW}
    assert {result(machine, number) for number in denied} == {EPERM}


@pytest.mark.parametrize(
    ("machine", "clone", "ioctl", "prlimit"), [("x86_64", 56, 16, 302), ("aarch64", 220, 29, 261)]
)
def test_calls_by_argument(machine, clone, ioctl, prlimit):
    assert result(machine, clone, 0x3D0F00) == ALLOW  # a thread of glibc
    assert result(machine, clone, 17) == EPERM  # a process
    assert result(machine, prlimit, 0) == ALLOW
    assert result(machine, prlimit, 1) == EPERM
    assert result(machine, ioctl, 0, 0x5401) == ALLOW
    assert result(machine, ioctl, 0, 0x40086602) == EPERM


@pytest.mark.parametrize("machine", MACHINES)
def test_calls_that_are_not_known(machine):
    # clone3, fchmodat2, setxattrat, and those of x32
    assert {result(machine, number) for number in (435, 452, 463, 0x40000000)} == {ENOSYS}
    assert result(machine, 0, architecture=0x40000003) == KILL  # 32 bits


def test_a_machine_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match="limited on x86_64 and aarch64; this is riscv64"):
        filter_calls("riscv64")
