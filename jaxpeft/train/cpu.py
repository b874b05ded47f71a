"""CPU settings of a process: reuse memory from one step to the next."""

from __future__ import annotations

import ctypes
import sys

import jax

# from glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Reuse the memory that a step frees for the next step, if the default device is a CPU.

    XLA allocates all temporary memory of a step at once, in its own thread, and glibc maps such a
    block anew each time. The kernel then zeroes hundreds of megabytes in every step, which takes a
    third of the step of a small BERT. This function therefore runs programs in the calling thread,
    whose heap may grow to any size, and turns off heap trimming and mmap. The process then keeps
    the memory of its largest step until it exits. Call it only in commands, before the first use of
    a device. It does nothing with other C libraries.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
