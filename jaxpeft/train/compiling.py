"""Compile programs: XLA options by device, and the persistent compilation cache."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from jaxpeft import cache
from jaxpeft.models.attention import platform

_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    # cuBLAS accumulates a product into its output. Triton GEMMs, XLA's default, write it to a
    # separate buffer that another pass adds. With cuBLAS: 504 ms a step instead of 517, and 7 GiB
    # less (Llama-3.1-8B, LoRA, 4 x 2048 tokens, H100)
    "cuda": {"xla_gpu_enable_triton_gemm": False},
}


_FOLDER = "jax_compilation_cache_dir"


def options(device: Any) -> dict[str, bool]:
    """Return the XLA options for a device, as `compiler_options` of `jax.jit`."""
    return dict(_OPTIONS.get(platform(device), {}))


def compile_each(lowered: Sequence[Any], device: Any) -> list[Any]:
    """Compile programs, in parallel for a CPU, since XLA compiles a program on one core.

    Other programs are compiled one by one, since compiling may autotune kernels on the device.

    Args:
        lowered: results of `jax.jit(...).lower`.
        device: device to compile for.

    Returns:
        The compiled programs, in the same order.
    """
    cores = (os.cpu_count() or 1) if platform(device) == "cpu" else 1
    with ThreadPoolExecutor(cores) as pool:
        return list(pool.map(lambda program: program.compile(), lowered))


def cache_folder() -> str | None:
    """Return the folder of the compilation cache, or None if it is off."""
    return getattr(jax.config, _FOLDER)


def keep_programs(where: str) -> str | None:
    """Turn on JAX's persistent compilation cache, so that later runs with the same shapes skip
    compilation.

    Hosts with different CPUs may share a folder: JAX keys programs by device, and CPU programs by
    instruction set, which XLA checks again on loading. Unreadable or unusable programs are compiled
    again.

    Args:
        where: a folder, `auto` for the user's cache directory, or `off`. A folder already set by
            `JAX_COMPILATION_CACHE_DIR` takes precedence.

    Returns:
        The folder, or None if programs are not cached.
    """
    if where == "off":
        return None
    configured = cache_folder()
    if configured:
        return configured
    own = cache.folder()
    if where == "auto" and own is None:
        return None
    folder = str(own / "compiled") if where == "auto" and own else where
    jax.config.update(_FOLDER, folder)
    return folder
