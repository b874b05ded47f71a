"""Filter of system calls of a process that runs a generated program, for seccomp.

Landlock does not cover the metadata of files, nor what a process may do to other processes. The
filter refuses both, and all that starts programs or opens connections
(https://docs.kernel.org/userspace-api/seccomp_filter.html).
"""

from __future__ import annotations

import struct

from jaxpeft.errors import ConfigError

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""The kernel's `AUDIT_ARCH` of each machine; both have the low half of an argument first."""
_DENIED = """
    chmod 90 -, fchmod 91 52, fchmodat 268 53, chown 92 -, fchown 93 55, lchown 94 -
    fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14
    lremovexattr 198 15, fremovexattr 199 16, utime 132 -, utimes 235 -, utimensat 280 88
    futimesat 261 -, truncate 76 45, mount 165 40, umount2 166 39, pivot_root 155 41
    move_mount 429 429, open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432
    fspick 433 433, mount_setattr 442 442, chroot 161 51, swapon 167 224, swapoff 168 225
    quotactl 179 60, quotactl_fd 443 443, acct 163 89, name_to_handle_at 303 264
    open_by_handle_at 304 265, fanotify_init 300 262
    fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, unshare 272 97, setns 308 268
    setsid 112 157, setpgid 109 154, kill 62 129, tkill 200 130, tgkill 234 131
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_open 434 434
    pidfd_send_signal 424 424, pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270
    process_vm_writev 311 271, process_madvise 440 440, kcmp 312 272, setpriority 141 140
    sched_setaffinity 203 122, sched_setparam 142 118, sched_setscheduler 144 119
    sched_setattr 314 274, ioprio_set 251 30, migrate_pages 256 238, move_pages 279 239
    socket 41 198, io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427
    bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, memfd_create 319 279
    memfd_secret 447 447, shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180
    mq_unlink 241 181, add_key 248 217, request_key 249 218, keyctl 250 219
    reboot 169 142, sethostname 170 161, setdomainname 171 162, init_module 175 105
    finit_module 313 273, delete_module 176 106, kexec_load 246 104, kexec_file_load 320 294
    settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266
    syslog 103 116, iopl 172 -, ioperm 173 -, modify_ldt 154 -
"""
"""Names of system calls, their numbers on x86_64 and aarch64, and `-` where there is none."""
_CLONE, _IOCTL, _PRLIMIT, _CLONE3 = (56, 220), (16, 29), (302, 261), 435
_FIRST_UNKNOWN = 450
"""Newer system calls are as if the kernel did not have them; those of x32 are larger too."""
_THREAD = 0x10000
_IOCTLS = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
"""TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX; others change flags of files."""
_ALLOW, _KILL, _ERRNO, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050000, 1, 38
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16


def filter_calls(machine: str) -> bytes:
    """Return a filter of system calls, as instructions of classic BPF.

    Args:
        machine: machine of the kernel, as of `platform.machine()`.

    Raises:
        ConfigError: The numbers of its system calls are not known.
    """
    if machine not in _ARCHITECTURES:
        raise ConfigError(
            f"--run-code: programs can be limited on {' and '.join(_ARCHITECTURES)}; this is"
            f" {machine}"
        )
    at = list(_ARCHITECTURES).index(machine)
    refuse = _step(_RETURN, _ERRNO | _EPERM)
    absent = _step(_RETURN, _ERRNO | _ENOSYS)
    allow = _step(_RETURN, _ALLOW)
    return b"".join(
        [
            _step(_LOAD, _ARCHITECTURE),
            _step(_EQUAL, _ARCHITECTURES[machine], yes=1),
            _step(_RETURN, _KILL),
            _step(_LOAD, _NUMBER),
            *(_step(_AT_LEAST, _FIRST_UNKNOWN, no=1), absent),
            *(_step(_EQUAL, _CLONE3, no=1), absent),  # libraries use `clone` then
            *(part for number in _denied(at) for part in (_step(_EQUAL, number, no=1), refuse)),
            _step(_EQUAL, _CLONE[at], no=4),
            *(_argument(0), _step(_ANY_BIT, _THREAD, yes=1), refuse, allow),
            _step(_EQUAL, _PRLIMIT[at], no=4),  # only of the process itself
            *(_argument(0), _step(_EQUAL, 0, yes=1), refuse, allow),
            _step(_EQUAL, _IOCTL[at], no=2 + 2 * len(_IOCTLS)),
            _argument(1),
            *(part for one in _IOCTLS for part in (_step(_EQUAL, one, no=1), allow)),
            refuse,
            allow,
        ]
    )


def _denied(at: int) -> list[int]:
    """Return the numbers of the refused system calls on a machine."""
    rows = [one.split() for one in _DENIED.replace("\n", ",").split(",") if one.strip()]
    return [int(row[1 + at]) for row in rows if row[1 + at] != "-"]


def _argument(index: int) -> bytes:
    return _step(_LOAD, _ARGUMENTS + 8 * index)


def _step(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    """Return an instruction, which skips `yes` or `no` instructions if it is a comparison."""
    return struct.pack("<HBBI", code, yes, no, value)
