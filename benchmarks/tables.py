"""Generate benchmarks/README.md from the JSON lines of benchmarks/results/:
`python -m benchmarks.tables`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
HEAD = """# Benchmarks

The docstring of each module says what it measures. Modules that need no accelerator run with `make bench`.
`python -m benchmarks.tables` generates the tables below from `benchmarks/results/`, which holds what the commands
printed; nothing in them is typed by hand.
"""
MATMUL = """## One frozen product in every number format

`python -m benchmarks.matmul`: TFLOP/s forward and backward, the relative error of both, and the bytes per weight. The
error is that of the stored kernel, normal random numbers, and of the product.
"""
QUALITY = """## Quality of a quantized base

`python -m benchmarks.quality train --assets FOLDER`: LoRA on all linear modules, with their frozen kernels in each
format; the rest of a run is the same. Figures are the mean ± standard deviation over the seeds. `- none` is the
difference from the run of the same seed with a base in float32, or in the dtype that the line names. `banking77`
reports figures of the test rows, `stories` of the held-out stories. Before training, they are the cost of the format
alone, the same for every seed (a classifier's new head carries no information then). On a CPU, fp8 has only its weights
in 8 bits.
"""
ERROR = """## Error of the formats on real weights

`python -m benchmarks.quality error --assets FOLDER`: `||W' - W|| / ||W||` over the linear kernels of a model, median
(smallest to largest), beside the same for normal random numbers of the same shapes, and the value expected for normal
numbers from the format's codes and blocks alone, by quadrature. The mean error is the mean `|W' - W|` over the mean
`|W|`, the median over kernels. Blocks are weights that share a scale, by the inputs of a kernel; NF4's blocks continue
from output to output where 64 does not divide them.
"""


def lines(name: str) -> list[dict[str, Any]]:
    """Read the output of a command."""
    return [json.loads(line) for line in (HERE / "results" / name).read_text().splitlines()]


def matmul(name: str) -> str:
    """Write the table of `benchmarks.matmul`."""
    rows = lines(name)
    where = f"{rows[0]['device']}, jax {rows[0]['jax']}, {rows[0]['rows']} rows."
    table = [
        "| kernel | format | forward | backward | error forward | error backward | bytes |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([MATMUL, where, "", *table, *map(_row, rows), ""])


def _row(row: Mapping[str, Any]) -> str:
    return (
        f"| {row['shape']} | {row['format']} | {row['forward_tflops']:.0f} |"
        f" {row['backward_tflops']:.0f} | {row['forward_error']:.2%} | {row['backward_error']:.2%}"
        f" | {row['bytes_a_weight']:.3f} |"
    )


STEP = """## One training step

`python -m benchmarks.step`: AdamW with clipping, LoRA of rank 16 on all linear layers, random weights of the true
shapes and random tokens. `method none` trains the embedding of one token: the gradient passes through all layers, and
nothing is adapted. MFU counts the FLOPs that cannot be left out (4 per frozen and 6 per trained weight and token, and
causal attention) at the device's bfloat16 peak, whatever the number format and the recomputation. PEFT is Hugging
Face's, with adapters in bfloat16: `compile` is torch.compile, `checkpoint` gradient checkpointing, `nf4` a base
quantized by bitsandbytes, `liger` the kernels of Liger. The loss is that of the first and of the last step; the rows
differ in their number of steps.
"""


def step(*names: str) -> str:
    """Write the tables of `benchmarks.step`, one per device and shape: the newest line of each
    configuration, fastest first.
    """
    done = [row for name in names for row in lines(name) if not row.get("failed")]
    newest = {tuple(str(row.get(key, _USUAL.get(key))) for key in _SAME): row for row in done}
    parts = [STEP]
    for group in dict.fromkeys(tuple(row[key] for key in _GROUP) for row in newest.values()):
        of, (device, shape, batch, length) = (
            [r for r in newest.values() if tuple(r[key] for key in _GROUP) == group],
            group,
        )
        parts += [
            f"{device}, {shape}, {batch} x {length} tokens.",
            "",
            (
                "| program | base | method | remat | layers | tokens/s | step | peak | MFU |"
                " compilation | loss |"
            ),
            "|---|---|---|---|---|---|---|---|---|---|---|",
            *map(_step_row, sorted(of, key=lambda row: -row["tokens_per_second"])),
            "",
        ]
    return "\n".join(parts)


_GROUP = ("device", "shape", "batch", "length")
_USUAL = {"rank": 16, "attention": "cudnn"}
_SAME = (
    "rank",
    "attention",
    "xla",
    "device",
    "program",
    "shape",
    "quant",
    "method",
    "remat",
    "layers",
    "batch",
    "length",
)


def _step_row(row: Mapping[str, Any]) -> str:
    compiled = f"{row['compile_s']:.0f} s" if "compile_s" in row else ""
    return (
        f"| {row['program']} | {_base(row)} | {row['method']} | {row['remat']} |"
        f" {row.get('layers', '')} | {row['tokens_per_second']:,} | {row['step_ms']:.0f} ms |"
        f" {row['peak_gib']:.1f} GiB | {_share(row['mfu'])} | {compiled} | {row['loss'][0]:.3f},"
        f" {row['loss'][1]:.3f} |"
    )


Columns = Mapping[str, Callable[[Mapping[str, Any]], Any]]


def listed(text: str, name: str, columns: Columns) -> str:
    """Write a table with one row per line.

    Args:
        text: text above the table.
        name: name of the file in benchmarks/results/.
        columns: values of a line, by column title.
    """
    rows = lines(name)
    where = "; ".join(
        f"{device}, jax {jax}"
        for device, jax in dict.fromkeys((row["device"], row["jax"]) for row in rows)
    )
    table = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    table += [f"| {' | '.join(str(of(row)) for of in columns.values())} |" for row in rows]
    return "\n".join([text, f"{where}.", "", *table, ""])


def _base(row: Mapping[str, Any]) -> str:
    return "bf16" if row["quant"] == "none" else row["quant"]


MEMORY = """## Memory, predicted and measured

`python -m benchmarks.memory --beside benchmarks/results/step_h200.jsonl`: the memory that `python -m jaxpeft.plan`
predicts for one GPU by arithmetic, the memory that XLA reports for the compiled step, and the peak memory that
`benchmarks.step` measured.
"""
MEMORY_COLUMNS: Columns = {
    "shape": lambda row: row["shape"],
    "tokens": lambda row: f"{row['batch']} x {row['length']}",
    "base": _base,
    "remat": lambda row: row["remat"],
    "predicted": lambda row: f"{row['predicted_gib']:.2f} GiB",
    "compiled": lambda row: f"{row['compiled_gib']:.2f} GiB",
    "measured": lambda row: f"{row['measured_gib']:.2f} GiB",
    "predicted / measured": lambda row: f"{row['predicted_by_measured']:.3f}",
}


def _share(of: float | None) -> str:
    return "" if of is None else f"{of:.1%}"


WARM = """## The first step, with cached programs

`python -m benchmarks.step --steps 2 --cache`, run a second time: seconds from the command to the end of the first step,
including Python's imports and the creation of random weights; of these, tracing and reading the compiled program.
"""
WARM_COLUMNS: Columns = {
    "shape": lambda row: row["shape"],
    "base": _base,
    "remat": lambda row: row["remat"],
    "tracing": lambda row: f"{row['trace_s']} s",
    "reading": lambda row: f"{row['compile_s']} s",
    "first step": lambda row: f"{row['first_step_s']} s",
}
LONGEST = """## The longest row that trains

`python -m benchmarks.longest`: batch 1, LoRA of rank 16. The length is derived from the programs of two shorter rows,
and trained on for one step.
"""
LONGEST_COLUMNS: Columns = {
    "budget": lambda row: f"{row['budget_gb']:.0f} GB",
    "shape": lambda row: row["shape"],
    "base": _base,
    "remat": lambda row: row["remat"],
    "tokens": lambda row: f"{row['length']:,}",
    "peak": lambda row: f"{row['peak_gb']:.1f} GB",
    "step": lambda row: f"{row['step_s']:.0f} s",
    "device": lambda row: row["device"],
}
HEAD_LOSS = """## The loss of a large vocabulary

`python -m benchmarks.head_loss`: the memory and time of the head and the loss, beyond hidden states and head, forward
and backward: in chunks as runs compute it, and with the whole logits.
"""
HEAD_LOSS_COLUMNS: Columns = {
    "way": lambda row: row["way"],
    "vocabulary": lambda row: f"{row['vocab']:,}",
    "tokens": lambda row: f"{row['tokens']:,}",
    "temporaries": lambda row: f"{row['temporaries_gib']:.2f} GiB",
    "peak above": lambda row: f"{row['peak_gib']:.2f} GiB",
    "time": lambda row: f"{row['ms']:.0f} ms",
}
ATTENTION = """## Attention

`python -m benchmarks.attention`: 4 x 2048 tokens, 32 heads of 128 numbers, 8 key heads; forward, and with the gradient.
The error is relative to `xla` in float32.
"""
ATTENTION_COLUMNS: Columns = {
    "mask": lambda row: row["mask"],
    "kernel": lambda row: row["kernel"],
    "forward": lambda row: f"{row['forward_ms']:.2f} ms",
    "both": lambda row: f"{row['both_ms']:.2f} ms",
    "error": lambda row: f"{row['error_values']:.2%}",
    "error of gradients": lambda row: f"{row['error_gradients']:.2%}",
}
LORA = """## The product with a low-rank update

`python -m benchmarks.lora_product`: linear sites that read one input, 8192 rows, rank 16, forward and backward: site by
site, jointly as runs compute them, or with kernels to which the update is added for each product. The error is that of
the contribution of an update of a thousandth of the kernel to the outputs: merged kernels lose most of it in bfloat16.
"""
LORA_COLUMNS: Columns = {
    "base": _base,
    "sites": lambda row: row["sites"],
    "way": lambda row: row["way"],
    "time": lambda row: f"{row['ms']:.2f} ms",
    "error of the update": lambda row: f"{row['update_error']:.1%}",
}


GRADIENTS = """## Gradients in bfloat16

`python -m benchmarks.gradients`: the distance of the gradients of a LoRA step in bfloat16 from those in float32 on the
same base, over all trained leaves together, on a CPU, which computes fp8 in bfloat16.

| base | error | loss | loss in float32 |
|---|---|---|---|
"""


def gradients(name: str) -> str:
    """Write the table of `benchmarks.gradients`."""
    rows = [
        f"| {r['base']} | {r['error']:.2%} | {r['loss']:.4f} | {r['loss_float32']:.4f} |"
        for r in lines(name)
    ]
    return GRADIENTS + "\n".join([*rows, ""])


def quality(*names: str) -> str:
    """Write the tables of `benchmarks.quality train`, one per task and file."""
    files = [lines(name) for name in names]
    tasks = [
        [row for row in rows if row["task"] == task]
        for rows in files
        for task in _each(rows, "task")
    ]
    return "\n".join([QUALITY, *map(_task, tasks)])


def _task(rows: list[dict[str, Any]]) -> str:
    """Write the table of one task: one row per format, over its seeds."""
    one, forms = rows[0], _each(rows, "format")
    figures = _figures(one)
    titles = [title for name in figures for title in (name, "- none")]
    where = (
        f"{one['task']}, {one['model']}: {one['steps']} steps of {one['rows']} rows, up to"
        f" {one['max_length']} tokens"
    )
    seeds = ", ".join(map(str, _each(rows, "seed")))
    dtype = f", in {one['dtype']}" if "dtype" in one else ""
    table = [f"| {' | '.join(['format', *titles])} |", "|---" * (1 + len(titles)) + "|"]
    for form in forms:
        cells = [cell for of in figures.values() for cell in _cells(rows, form, of)]
        table.append(f"| {' | '.join([form, *cells])} |")
    return "\n".join(
        [
            (
                f"{where}, rank {one['rank']}{dtype}, seeds {seeds}; {one['device']}, jax"
                f" {one['jax']}."
            ),
            "",
            *table,
            "",
        ]
    )


def _figures(row: Mapping[str, Any]) -> dict[str, Callable[[Mapping[str, Any]], float]]:
    """Return the metrics of a task, by title."""
    after = {"loss": lambda row: row["after"]["loss"]}
    if row["before"]:
        return {"loss before": lambda row: row["before"]["loss"], **after}
    return {"accuracy": lambda row: row["after"]["accuracy"], **after}


def _cells(
    rows: list[dict[str, Any]], form: str, of: Callable[[Mapping[str, Any]], float]
) -> tuple[str, str]:
    """Write a metric of one format, and its difference from that of `none` with the same seed."""
    here, none = (
        {row["seed"]: of(row) for row in rows if row["format"] == name} for name in (form, "none")
    )
    apart = [value - none[seed] for seed, value in here.items() if seed in none]
    return _over_seeds(list(here.values())), (
        "" if form == "none" or not apart else _over_seeds(apart, "+")
    )


def _over_seeds(values: list[float], sign: str = "") -> str:
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.4f}{spread}"


def _each(rows: list[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def error(name: str) -> str:
    """Write the table of `benchmarks.quality error`."""
    rows = lines(name)
    count = {
        row["model"]: f"{row['model']}, {row['kernels']} kernels of {row['weights']:,} weights"
        for row in rows
    }
    table = [
        (
            "| model | format | blocks | bytes | error | normal | expected | mean error | normal |"
            " expected |"
        ),
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(
        [
            ERROR,
            f"{'; '.join(count.values())}; jax {rows[0]['jax']}.",
            "",
            *table,
            *map(_error_row, rows),
            "",
        ]
    )


def _error_row(row: Mapping[str, Any]) -> str:
    blocks = ", ".join(
        f"{n_in}: {block}"
        for n_in, block in sorted(row["blocks"].items(), key=lambda one: int(one[0]))
    )
    wide = [
        f"{of['median']:.2%} ({of['min']:.2%} to {of['max']:.2%})"
        for of in (row["rms"], row["normal_rms"])
    ]
    means = [
        f"{row[name]['median']:.2%}"
        for name in ("absolute", "normal_absolute", "expected_absolute")
    ]
    cells = [*wide, f"{row['expected_rms']['median']:.2%}", *means]
    return (
        f"| {row['model']} | {row['format']} | {blocks} | {row['bytes_a_weight']:.3f} |"
        f" {' | '.join(cells)} |"
    )


SHARDS = """## Loading into shards

`python -m benchmarks.shard_loading`: a Llama of TinyLlama's width, loaded by several processes of two CPU devices each
on one machine with two cores. Figures are those of the process with the highest: the bytes it requested from the files,
the bytes its devices hold (each part once) before kernels are quantized, the ratio of both, the largest part on one
device, and its peak memory above what its devices hold in the end. The machine was busy with other work: of the times,
the CPU time of one process says more.

| leaves | base | layers | processes | read | its part | read / part | largest part | memory above | seconds | of the processor |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def shard_loading(name: str) -> str:
    """Write the table of `benchmarks.shard_loading`."""
    rows = lines(name)
    model = f"The model has {rows[0]['model_mb']:.0f} MB in bfloat16; jax {rows[0]['jax']}."
    return SHARDS + "\n".join([*map(_shard_row, rows), "", model, ""])


def _shard_row(row: Mapping[str, Any]) -> str:
    cells = [
        row["way"],
        "bf16" if row["quant"] == "none" else row["quant"],
        "scanned" if row["scan_layers"] else "unrolled",
        str(row["processes"]),
        *(f"{row[key]:.0f} MB" for key in ("read_mb", "part_mb")),
        f"{row['read_over_part']:.3f}",
        *(f"{row[key]:.0f} MB" for key in ("largest_mb", "above_mb")),
        *(f"{row[key]:.1f}" for key in ("seconds", "cpu_seconds")),
    ]
    return f"| {' | '.join(cells)} |"


SEGMENTS = """## Reading a part of each row

`python -m benchmarks.segments`: GB/s of the part, one thread, from the page cache (warm, by CPU time) and from the disk
(cold, by wall-clock time). The columns are a call for each row; a mapping of a few rows, which is what `jaxpeft` does;
and whole rows, which requests all their bytes.

| row | part | calls, warm | mapped, warm | whole, warm | calls, cold | mapped, cold | whole, cold |
|---|---|---|---|---|---|---|---|
"""


def segments(name: str) -> str:
    """Write the table of `benchmarks.segments`."""
    ways = [f"{way}_{state}" for state in ("warm", "cold") for way in ("calls", "mapped", "whole")]
    sizes = ("row_bytes", "part_bytes")
    rows = [
        [*(f"{row[key]:,} B" for key in sizes), *(f"{row[way]:.2f}" for way in ways)]
        for row in lines(name)
    ]
    return SEGMENTS + "\n".join([*(f"| {' | '.join(cells)} |" for cells in rows), ""])


STRATEGIES = """## The same result under every strategy

`python -m benchmarks.strategies`: loss and gradients of one batch of a tiny Llama in float32, on simulated CPU devices,
against those of one device: the largest difference, relative to the loss and to the largest number of each leaf's
gradient. All rows except those of `lora, packed` are from before the scales of norms were drawn about 1.

```
"""


def strategies(name: str) -> str:
    """Return the output of `benchmarks.strategies`."""
    return STRATEGIES + (HERE / "results" / name).read_text() + "```\n"


if __name__ == "__main__":
    tables = [
        step("step_h200.jsonl", "step_h100.jsonl"),
        listed(MEMORY, "memory_h200.jsonl", MEMORY_COLUMNS),
        listed(WARM, "warm_h200.jsonl", WARM_COLUMNS),
        listed(LONGEST, "longest.jsonl", LONGEST_COLUMNS),
        listed(HEAD_LOSS, "head_loss_h200.jsonl", HEAD_LOSS_COLUMNS),
        listed(ATTENTION, "attention_h200.jsonl", ATTENTION_COLUMNS),
        listed(LORA, "lora_product_h200.jsonl", LORA_COLUMNS),
        gradients("gradients_cpu.jsonl"),
        matmul("matmul_h100.jsonl"),
        quality("quality_cpu.jsonl", "quality_h100.jsonl"),
        error("error_cpu.jsonl"),
        shard_loading("shard_loading_cpu.jsonl"),
        segments("segments_cpu.jsonl"),
        strategies("strategies_cpu.txt"),
    ]
    (HERE / "README.md").write_text("\n".join([HEAD, *tables]))
