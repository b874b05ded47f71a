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


if __name__ == "__main__":
    (HERE / "README.md").write_text("\n".join([HEAD, matmul("matmul_h100.jsonl")]))
