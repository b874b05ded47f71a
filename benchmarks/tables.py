"""Writes benchmarks/README.md from the JSON lines of benchmarks/results/: `python -m benchmarks.tables`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """# Benchmarks

Each module says in its docstring what it measures; those that need no accelerator run with `make bench`. The tables below are made of
`benchmarks/results/*.jsonl`, what the commands printed, by `python -m benchmarks.tables`; nothing in them is typed by hand.
"""
MATMUL = """## One frozen product in every number format

`python -m benchmarks.matmul`: TFLOP/s forward and backward, the relative error of both, and the bytes of a weight. The error is that
of the stored kernel, normal random numbers, and of the product.
"""


def lines(name: str) -> list[dict[str, Any]]:
    """Reads what a command printed."""
    return [json.loads(line) for line in (HERE / "results" / name).read_text().splitlines()]


def matmul(name: str) -> str:
    """Writes the table of `benchmarks.matmul`."""
    rows = lines(name)
    where = f"{rows[0]['device']}, jax {rows[0]['jax']}, {rows[0]['rows']} rows."
    table = [
        "| kernel | format | forward | backward | error forward | error backward | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([MATMUL, where, "", *table, *map(_row, rows), ""])


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['shape']} | {row['format']} | {row['forward_tflops']:.0f} | {row['backward_tflops']:.0f} | "
        f"{row['forward_error']:.2%} | {row['backward_error']:.2%} | {row['bytes_a_weight']:.3f} |"
    )


STEP = """## One training step

`python -m benchmarks.step`: AdamW with clipping, LoRA of rank 16 on all linear layers, random weights of the true shapes and random
tokens. `method none` trains the embedding of one token: the gradient goes through all layers, and nothing is adapted. MFU is that of the
FLOPs that cannot be left out (4 a frozen and 6 a trained weight and token, and causal attention) at the device's bfloat16 peak, whatever
the number format and whatever is computed again. PEFT is Hugging Face's, with adapters in bfloat16: `peft-compile` is torch.compile, `peft-checkpoint`
gradient checkpointing. The loss is that of the first and of the last step.
"""


def step(name: str) -> str:
    """Writes the table of `benchmarks.step`: of the same work the newest line, fastest first."""
    rows = lines(name)
    newest = {tuple(row.get(key) for key in _SAME): row for row in rows}
    parts = [STEP]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        of = sorted((r for r in newest.values() if r["shape"] == shape), key=lambda r: -r["tokens_per_second"])
        parts += [
            f"{of[0]['device']}, {shape}, {of[0]['batch']} x {of[0]['length']} tokens.",
            "",
            "| program | base | method | remat | layers | tokens/s | step | peak | MFU | compilation | loss |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *map(_step_row, of),
            "",
        ]
    return "\n".join(parts)


_SAME = ("program", "shape", "quant", "method", "remat", "layers", "batch", "length")


def _step_row(row: Mapping[str, Any]) -> str:
    compiled = f"{row['compile_s']:.0f} s" if "compile_s" in row else ""
    return (
        f"| {row['program']} | {'bf16' if row['quant'] == 'none' else row['quant']} | {row['method']} | {row['remat']} | "
        f"{row.get('layers', '')} | {row['tokens_per_second']:,} | {row['step_ms']:.0f} ms | {row['peak_gib']:.1f} GiB | {row['mfu']:.1%} | "
        f"{compiled} | {row['loss'][0]:.3f}, {row['loss'][1]:.3f} |"
    )


if __name__ == "__main__":
    (HERE / "README.md").write_text("\n".join([HEAD, step("step_h100.jsonl"), matmul("matmul_h100.jsonl")]))
