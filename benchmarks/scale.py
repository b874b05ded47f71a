"""Plans for large models on large topologies, without accelerators: `python -m benchmarks.scale`,
as a nightly job.

    python -m benchmarks.scale [--models llama3_8b ...] [--topologies v5e:16x16 ...] [--strategies fsdp ...] [--write-only]

Plans LoRA of rank 16 on all linear layers, with one row of 2048 tokens per device, for every model,
topology and strategy, each in a separate process (`python -m jaxpeft.plan`), and appends the plans
to benchmarks/results/scale.jsonl, one per line; existing plans are skipped. Then it writes
docs/scale.md from that file. `--write-only` does only that.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.kernels import QUANTIZED
from jaxpeft.plan.shapes import SHAPES

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results/scale.jsonl", ROOT / "docs/scale.md"
MODELS = ("llama3_8b", "llama3_70b", "llama3_405b")
TOPOLOGIES = ("v5e:16x16", "v5p:4x4x8", "v6e:16x16")
STRATEGIES = ("fsdp", "fsdp_tensor", "tensor", "hybrid_fsdp", "sequence", "replicated")
LENGTH, GIB = 2048, 2**30
CHOSEN = (
    ("llama3_8b", "none", "v5e:4x4"),
    ("llama3_70b", "nf4", "v5e:8x8"),
    ("llama3_405b", "none", "v5p:8x8x8"),
)
"""Beside the grid: a model that fits a small slice, one that is quantized, and the largest there
is.
"""


@dataclass(frozen=True)
class Case:
    """One plan, made in a separate process.

    Attributes:
        model: a name in `jaxpeft.plan.shapes.SHAPES`.
        quant: number format of its base.
        topology: value of `--topology`.
        strategy: strategy of the mesh.
    """

    model: str
    quant: str
    topology: str
    strategy: str

    @property
    def devices(self) -> int:
        """Return the number of devices."""
        count = 1
        for n in self.topology.partition(":")[2].split("x"):
            count *= int(n)
        return count


def main(argv: list[str]) -> int:
    """Make missing plans, and write the page; return the exit code: 1 if a case has no plan."""
    parser = argparse.ArgumentParser(prog="benchmarks.scale")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(SHAPES))
    parser.add_argument("--topologies", nargs="*", default=list(TOPOLOGIES))
    parser.add_argument(
        "--strategies", nargs="*", default=list(STRATEGIES), choices=list(STRATEGIES)
    )
    parser.add_argument("--quant", default="none", choices=["none", *QUANTIZED])
    parser.add_argument(
        "--chosen", action="store_true", help="plan what stands beside the grid, in place of it"
    )
    parser.add_argument(
        "--timeout", type=float, default=3600, help="seconds that one plan may take"
    )
    parser.add_argument(
        "--tries",
        type=int,
        default=1,
        help="changes that are compiled where a strategy does not fit",
    )
    parser.add_argument("--write-only", action="store_true")
    options = parser.parse_args(argv)
    failed = 0
    for case in [] if options.write_only else cases(options):
        if case not in done():
            failed += not run(case, options.timeout, options.tries)
    PAGE.write_text(page(lines()))
    return int(failed > 0)


def cases(options: Any) -> Iterator[Case]:
    """Yield the requested cases, models that compile fast first."""
    if options.chosen:
        yield from (Case(*one, strategy) for one in CHOSEN for strategy in options.strategies)
        return
    for model in options.models:
        for topology in options.topologies:
            yield from (
                Case(model, options.quant, topology, strategy) for strategy in options.strategies
            )


def lines() -> list[dict[str, Any]]:
    """Read the existing plans."""
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []
    )


def done() -> set[Case]:
    """Return the cases with existing plans."""
    return {Case(**line["case"]) for line in lines()}


def run(case: Case, timeout: float, tries: int) -> bool:
    """Plan one case, and append it to the results; report a case that times out or fails, and
    return False for it.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        command = [
            sys.executable,
            "-m",
            "jaxpeft.plan",
            "--config",
            "configs/llama3_8b_lora.py",
            "--model-config",
            case.model,
            "--topology",
            case.topology,
            "--strategies",
            case.strategy,
            "--json",
            str(file),
            "--tries",
            str(tries),
            "--config.model.quant",
            case.quant,
            "--config.data.max_length",
            str(LENGTH),
            "--config.train.accumulation",
            "1",
            "--config.train.batch_size",
            str(case.devices),
            "--config.train.steps",
            "1000",
            "--config.train.epochs",
            "None",
        ]
        try:
            subprocess.run(
                command, check=False, timeout=timeout, cwd=ROOT, stdout=subprocess.DEVNULL
            )
        except subprocess.TimeoutExpired:
            sys.stderr.write(f"{case}: took more than {timeout:.0f} s\n")
            return False
        if not file.is_file():
            sys.stderr.write(f"{case}: no plan\n")
            return False
        plan = json.loads(file.read_text())
    with RESULTS.open("a") as out:
        out.write(json.dumps({"case": vars(case), "plan": plan}) + "\n")
    return True


HEAD = """# Large models on large topologies

`python -m benchmarks.scale` plans LoRA of rank 16 on all linear layers of Llama 3, with one row of 2048 tokens per
device. It compiles the step ahead of time for devices that need not exist ([plan.md](plan.md)). This page is generated
from `benchmarks/results/scale.jsonl`; nothing in it was measured on a TPU. GiB are per device, and so is what a step
sends. The step is the highest of three roofs, and no run is faster: tokens/s and MFU are bounds. If a strategy does not
fit, the line below it is the nearest change that does, if one was found.
"""
COLUMNS = (
    "| strategy | mesh | remat | base | adapters and optimizer | activations | temporaries | total"
    " | of | sent | step | bound by | tokens/s | MFU | |"
)


def page(found: list[dict[str, Any]]) -> str:
    """Write the page."""
    parts = [HEAD]
    groups = dict.fromkeys(
        (line["case"]["model"], line["case"]["quant"], line["case"]["topology"]) for line in found
    )
    for model, quant, topology in groups:
        own = [
            line
            for line in found
            if (line["case"]["model"], line["case"]["quant"], line["case"]["topology"])
            == (model, quant, topology)
        ]
        plan = own[0]["plan"]
        rows = [
            row
            for line in own
            for top in line["plan"]["rows"]
            for row in (top, top["nearest"])
            if row is not None
        ]
        fitting = [row for row in rows if row["fits"] and row["roofline"]]
        best = min(fitting, key=lambda row: row["roofline"]["seconds"], default=None)
        title = (
            f"## {model}, {'bf16' if quant == 'none' else quant}, {topology} ({plan['devices']}"
            " chips)"
        )
        said = (
            "none of these fits."
            if best is None
            else (
                f"best: `{named(best)}`, {best['memory']['total'] / GIB:.2f} GiB a chip, "
                f"{best['roofline']['tokens_per_second']:,.0f} tokens/s at most."
            )
        )
        cpu = sum(line["plan"]["cpu_seconds"] for line in own)
        parts += [
            title,
            (
                f"{plan['parameters'] / 1e9:.1f} B parameters, {plan['trained'] / 1e6:.0f} M"
                f" trained; {said}"
            ),
        ]
        parts += ["\n".join([COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1), *map(_line, rows)])]
        parts.append(f"{cpu:.0f} s of a core, {_versions(plan)}, layers {plan['layers']}.")
    return "\n\n".join([*parts, *_missing(found)]) + "\n"


def _missing(found: list[dict[str, Any]]) -> list[str]:
    """Return the cases of the grid without a plan."""
    there = {Case(**line["case"]) for line in found}
    rows: list[str] = []
    for model in MODELS:
        for topology in TOPOLOGIES:
            left = [one for one in STRATEGIES if Case(model, "none", topology, one) not in there]
            rows += [f"| {model} | {topology} | {', '.join(left)} |"] if left else []
    if not rows:
        return []
    said = "`python -m benchmarks.scale` goes on with what is left of its grid:"
    return [
        "## Not planned yet",
        said,
        "\n".join(["| model | topology | strategies |", "|---|---|---|", *rows]),
    ]


def named(row: Mapping[str, Any]) -> str:
    """Return the name of a strategy with its changes."""
    return f"{row['strategy']}, {row['change']}" if row["change"] else row["strategy"]


def _versions(plan: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in plan["versions"].items())


def _line(row: Mapping[str, Any]) -> str:
    mesh = " x ".join(f"{axis} {size}" for axis, size in row["mesh"].items() if size > 1)
    memory, roof = row["memory"], row["roofline"]
    if memory is None:
        return f"| {named(row)} | {' | ' * 13} {row['verdict']} |"
    sizes = (
        memory["base"],
        memory["adapters"] + memory["optimizer"],
        memory["activations"],
        memory["temporaries"],
        memory["total"],
        memory["limit"],
    )
    sent = (
        f"{sum(one['wire'] for one in row['collectives']) / GIB:.2f}"
        if row["collectives"] is not None
        else "?"
    )
    fast = ["?"] * 4
    if roof is not None:
        fast = [
            f"{1e3 * roof['seconds']:,.0f} ms",
            roof["bound"],
            f"{roof['tokens_per_second']:,.0f}",
            f"{roof['mfu']:.0%}",
        ]
    cells = [
        named(row),
        mesh,
        row["remat"],
        *(f"{n / GIB:.2f}" for n in sizes),
        sent,
        *fast,
        "fits" if row["fits"] else "does not fit",
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
