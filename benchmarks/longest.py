"""The longest row that trains within a memory budget, batch 1: extrapolated from two compiled
programs, then tried.

    python -m benchmarks.longest [--budget 80 GB] [--shape llama3_8b] [--quant nf4] [--remat full] [--probe 16384 32768]

Memory is a constant plus a size per token: two compiled programs determine both, and the predicted
row is compiled and trained on for a step, with its memory measured. Prints a JSON line. All other
options are those of `benchmarks.step`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from typing import Any

import numpy as np

from benchmarks import step

ROUND = 1024
"""Lengths are multiples of this many tokens."""
SHARE = 0.985
"""Of the budget that a program may plan: the allocator needs room between its pieces."""


def main(argv: list[str]) -> None:
    """Find the longest row, and train on it."""
    parser = argparse.ArgumentParser(prog="benchmarks.longest")
    parser.add_argument("--budget", type=float, default=80.0, help="GB of memory, 10^9 bytes")
    parser.add_argument("--shape", choices=sorted(step.SHAPES), default="llama3_8b")
    parser.add_argument("--quant", default="nf4")
    parser.add_argument("--remat", default="full")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--scan", action="store_true")
    parser.add_argument("--probe", type=int, nargs=2, default=(16384, 32768))
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument(
        "--try", dest="length", type=int, help="train on rows of this length at once"
    )
    options = parser.parse_args(argv)
    options.method, options.attention, options.batch = "lora", "auto", 1
    vocab, rng = step.SHAPES[options.shape]["vocab_size"], np.random.default_rng(0)

    def batch(length: int) -> Any:
        return step.batch_of(rng.integers(0, vocab, (1, length)).astype(np.int32))

    budget, program = (
        options.budget * 1e9,
        step.program(argparse.Namespace(**(vars(options) | {"length": ROUND}))),
    )
    length, told = options.length, {}
    if length is None:
        at = [
            step.planned(dataclasses.replace(program, batch=batch(probe)).compiled())
            for probe in options.probe
        ]
        slope = (at[1] - at[0]) / (options.probe[1] - options.probe[0])
        fixed = at[0] - slope * options.probe[0]
        length = int((SHARE * budget - fixed) / slope) // ROUND * ROUND
        told = {"bytes_a_token": round(slope), "fixed_gb": round(fixed / 1e9, 2)}
        sys.stderr.write(f"{told}, to try: {length}\n")
    step.emit(
        {
            "program": "jaxpeft",
            **_of(options),
            **told,
            **trained(dataclasses.replace(program, batch=batch(length)), length, options.steps),
        }
    )


def _of(options: Any) -> dict[str, Any]:
    names = ("shape", "quant", "remat", "rank")
    return (
        {"budget_gb": options.budget}
        | {name: getattr(options, name) for name in names}
        | {"layers": "scanned" if options.scan else "unrolled"}
    )


def trained(program: step.Program, length: int, steps: int) -> dict[str, Any]:
    """Train a few steps on a row of a length; return the time and memory."""
    import jax

    began = time.perf_counter()
    compiled = program.compiled()
    ready = time.perf_counter()
    state, seconds, losses = program.state, list[float](), list[float]()
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, program.frozen, program.batch)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "length": length,
        "planned_gb": round(step.planned(compiled) / 1e9, 2),
        "peak_gb": round(stats.get("peak_bytes_in_use", 0) / 1e9, 2),
        "compile_s": round(ready - began, 1),
        "step_s": round(seconds[-1], 2),
        "tokens_per_second": round(length / seconds[-1]),
        "loss": [round(loss, 4) for loss in losses],
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
