"""How a process computes on a CPU: its memory is kept from one step to the next."""

from __future__ import annotations

import ctypes
import sys

import jax

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_memory() -> None:
    """Keep what a step frees for the next one, where the default device is a CPU.

    XLA asks for all temporary memory of a step at once, from a thread of its own, and glibc maps
    such a block anew each time: the kernel fills hundreds of megabytes with zeros in every step, a
    third of the step of a small BERT. So programs run in the thread that calls them, whose heap may
    grow to any size, and that heap is neither trimmed nor passed by. The process then holds its
    largest step to its end. It is for commands, before the first use of a device; other C libraries
    are left as they are.
    """
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)
