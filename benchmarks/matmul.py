"""One frozen product in every number format, forward and backward: time, error and memory.

    python -m benchmarks.matmul [--rows 8192] [--shape 4096x14336 ...] [--repeats 20]

Prints a JSON line per format and shape. The backward pass computes only the gradient of the input,
because the kernel is never trained. Errors are `||found - exact|| / ||exact||`, compared with the
product of the same bfloat16 kernel in float32, with normal inputs and gradients: they combine the
errors of the stored kernel and of the product.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.kernels import QUANTIZED

LLAMA_8B = ("4096x4096", "4096x1024", "4096x14336", "14336x4096")


def milliseconds(
    run: Callable[..., Any], arguments: tuple[Any, ...], repeats: int, inner: int = 10
) -> float:
    """Return the median time of a call, from batches of calls that synchronize only on the device."""
    jax.block_until_ready(run(*arguments))
    times: list[float] = []
    for _ in range(repeats):
        began = time.perf_counter()
        for _ in range(inner):
            out = run(*arguments)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - began) / inner)
    return 1e3 * statistics.median(times)


def off(found: Any, exact: Any) -> float:
    """Return the relative error."""
    difference = jnp.linalg.norm(found.astype(jnp.float32) - exact)
    return float(difference / jnp.linalg.norm(exact))


def measure(name: str, kernel: Any, x: Any, dy: Any, repeats: int) -> dict[str, Any]:
    """Measure one format; `bf16` is the kernel as it is."""
    leaves = {"kernel": kernel} if name == "bf16" else jax.jit(QUANTIZED[name].store)(kernel)
    product = (lambda x, leaves: x @ leaves["kernel"]) if name == "bf16" else QUANTIZED[name].matmul
    forward = jax.jit(product)
    both = jax.jit(lambda x, dy, leaves: jax.vjp(lambda x: product(x, leaves), x)[1](dy)[0])
    wide = kernel.astype(jnp.float32)
    with jax.default_matmul_precision("highest"):
        y, dx = x.astype(jnp.float32) @ wide, dy.astype(jnp.float32) @ wide.T
    ahead, behind = (
        milliseconds(run, given, repeats)
        for run, given in ((forward, (x, leaves)), (both, (x, dy, leaves)))
    )
    work = 2 * x.shape[0] * kernel.size / 1e9
    return {
        "format": name,
        "shape": "x".join(map(str, kernel.shape)),
        "rows": x.shape[0],
        "forward_ms": round(ahead, 4),
        "backward_ms": round(behind, 4),
        "forward_tflops": round(work / ahead, 1),
        "backward_tflops": round(work / behind, 1),
        "forward_error": off(forward(x, leaves), y),
        "backward_error": off(both(x, dy, leaves), dx),
        "bytes_a_weight": sum(leaf.nbytes for leaf in leaves.values()) / kernel.size,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def main(argv: list[str]) -> None:
    """Measure all formats of all shapes."""
    parser = argparse.ArgumentParser(prog="benchmarks.matmul")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--shape", nargs="+", default=LLAMA_8B)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(argv)
    for shape in options.shape:
        n_in, n_out = map(int, shape.split("x"))
        keys = jax.random.split(jax.random.key(0), 3)
        kernel = (0.02 * jax.random.normal(keys[0], (n_in, n_out))).astype(jnp.bfloat16)
        x, dy = (
            jax.random.normal(k, (options.rows, n), jnp.bfloat16)
            for k, n in zip(keys[1:], (n_in, n_out), strict=True)
        )
        for name in ("bf16", *QUANTIZED):
            sys.stdout.write(json.dumps(measure(name, kernel, x, dy, options.repeats)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
