"""How programs are compiled: XLA's options for a device, and where compiled programs are kept for
the next run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxpeft import cache
from jaxpeft.models.attention import platform

_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    # cuBLAS adds a product to what is there already; Triton's products, which XLA takes for all of
    # them, write it apart, and the sum is another pass: 504 ms a step in place of 517, and 7 GiB
    # less (Llama-3.1-8B, LoRA, 4 x 2048
    # tokens, H100)
    "cuda": {"xla_gpu_enable_triton_gemm": False},
}


_FOLDER = "jax_compilation_cache_dir"


def options(device: Any) -> dict[str, bool]:
    """Return XLA's options for programs of a device: `compiler_options` of `jax.jit`."""
    return dict(_OPTIONS.get(platform(device), {}))


def compile_each(lowered: Sequence[Any], device: Any) -> list[Any]:
    """Compile programs, of a CPU several at once: XLA compiles one on one core. Those of others may
    try kernels on the device, in turn.

    Args:
        lowered: what `jax.jit(...).lower` gives.
        device: that they are for.

    Returns:
        The compiled programs, in the same order.
    """
    cores = (os.cpu_count() or 1) if platform(device) == "cpu" else 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


def cache_folder() -> str | None:
    """Return the folder where compiled programs are kept, None for nowhere."""
    return getattr(jax.config, _FOLDER)


def keep_programs(where: str) -> str | None:
    """Keep compiled programs on disk, so that the next run of the same shapes need not compile
    them.

    Hosts of different CPUs may share a folder: JAX finds a program by its device, of a CPU by its
    instruction set, which XLA compares again as it loads one. What cannot be read or used is
    compiled anew.

    Args:
        where: a folder; `auto` for one of the user's; `off` for nowhere. A folder that JAX is told
            of already, by `JAX_COMPILATION_CACHE_DIR`, stays.

    Returns:
        The folder, None where nothing is kept.
    """
    if where == "off":
        return None
    told = cache_folder()
    if told:
        return told
    own = cache.folder()
    if where == "auto" and own is None:
        return None
    folder = str(own / "compiled") if where == "auto" and own else where
    jax.config.update(_FOLDER, folder)
    return folder
