"""How programs are compiled: XLA's options for a device, and where compiled programs are kept for the next run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from jaxpeft import cache
from jaxpeft.models.attention import platform

_OPTIONS: Mapping[str, Mapping[str, bool]] = {
    # cuBLAS adds a product to what is there already; Triton's products, which XLA takes for all of them, write it apart, and the sum
    # is another pass: 504 ms a step in place of 517, and 7 GiB less (Llama-3.1-8B, LoRA, 4 x 2048 tokens, H100)
    "cuda": {"xla_gpu_enable_triton_gemm": False},
}


_FOLDER = "jax_compilation_cache_dir"


def options(device: Any) -> dict[str, bool]:
    """Gives XLA's options for programs of a device: `compiler_options` of `jax.jit`."""
    return dict(_OPTIONS.get(platform(device), {}))


def kept_in() -> str | None:
    """Gives the folder where compiled programs are kept, None for nowhere."""
    return getattr(jax.config, _FOLDER)


def keep_programs(where: str) -> str | None:
    """Keeps compiled programs on disk, so that the next run of the same shapes need not compile them.

    Args:
        where: a folder; `auto` for one of the user's, on an accelerator (a program for a CPU is for that very CPU); `off` for nowhere.
            A folder that JAX is told of already, by `JAX_COMPILATION_CACHE_DIR`, stays.

    Returns:
        The folder, None where nothing is kept.
    """
    if where == "off":
        return None
    told = kept_in()
    if told:
        return told
    own = cache.folder()
    if where == "auto" and (own is None or jax.default_backend() == "cpu"):
        return None
    folder = str(own / "compiled") if where == "auto" and own else where
    jax.config.update(_FOLDER, folder)
    return folder
