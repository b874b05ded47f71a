"""Loading a model into shards with several processes: bytes read, size of the shards, peak host
memory and seconds of each process.

    python -m benchmarks.shard_loading [--layers 6] [--processes 1 2 4] [--folder FOLDER]

Creates a Llama of TinyLlama's width with random numbers in a temporary folder, or uses the model in
FOLDER, and loads it with 1, 2 and 4 processes of two CPU devices each, connected by gloo. `fsdp`
shards every matrix along the rows of its tensor in the file; `tensor` is tensor parallelism: o and
down along columns, all other matrices along rows; `columns` shards every matrix of a layer along
columns. For each process, `read_mb` is the number of bytes that it reads from the files, `held_mb`
the size of its devices' shards, each counted once, `part_mb` the same share of the model's
`model_mb`; `peak_mb` is its peak memory during the load minus its memory before, which on a CPU
includes the shards; `above_mb` excludes them, for comparison with `largest_mb`, the largest shard
of a device. With quantization on loading, it includes the work of a CPU device on one kernel, and
the compiler. All processes share this machine's cores, and read from the page cache. Prints a JSON
line for each run, with the maxima over its processes.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.loading import make_model, resident_bytes

DEVICES = 2
WAYS = ("fsdp", "tensor", "columns")
RUNS = (
    {"way": "fsdp"},
    {"way": "tensor"},
    {"way": "columns"},
    {"way": "fsdp", "scan_layers": True},
    {"way": "tensor", "scan_layers": True},
    {"way": "fsdp", "quant": "nf4"},
    {"way": "tensor", "quant": "nf4"},
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        port, count, index, options = args.child
        sys.stdout.write(
            json.dumps(load(args.folder, port, int(count), int(index), json.loads(options))) + "\n"
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        if args.folder is None:
            make_model(folder, args.layers, "bfloat16")
        for line in measure(folder, args.processes):
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def measure(folder: Path, counts: list[int]) -> Iterator[dict[str, Any]]:
    """Run every sharding with every number of processes; yield the maxima over the processes of a
    run.
    """
    import jax

    for options in RUNS:
        for count in counts:
            each = run(folder, count, dict(options))
            first = each[0]
            worst = {key: max(one[key] for one in each) for key in first if key != "model_mb"}
            yield {
                "scan_layers": False,
                "quant": "none",
                **options,
                "processes": count,
                "devices": DEVICES * count,
                "model_mb": first["model_mb"],
                **worst,
                "read_over_part": round(max(one["read_mb"] / one["part_mb"] for one in each), 3),
                "jax": jax.__version__,
            }


def run(folder: Path, count: int, options: dict[str, Any]) -> list[dict[str, float]]:
    """Load once, in separate processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [
        sys.executable,
        "-m",
        "benchmarks.shard_loading",
        "--folder",
        str(folder),
        "--child",
        str(port),
        str(count),
    ]
    environment = os.environ | {"JAXPEFT_CACHE": "off", "JAX_PLATFORMS": "cpu"}
    started = [
        subprocess.Popen(
            [*program, str(i), json.dumps(options)],
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for i in range(count)
    ]
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        sys.exit("a process failed")
    return [
        json.loads(text.splitlines()[-1]) for text in said
    ]  # gloo prints lines of its own before


def load(
    folder: Path, port: str, count: int, index: int, options: dict[str, Any]
) -> dict[str, float]:
    """Load this process's shards; return the measurements of one process."""
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    if count > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", count, index)
    from jaxpeft.hub.loading import outline
    from jaxpeft.hub.model_request import ModelRequest
    from jaxpeft.quant.quantize import Quant

    logging.getLogger("jaxpeft").setLevel("WARNING")
    way = options.pop("way")
    quant = options.pop("quant", None)
    plain = jax.tree.leaves(outline(folder, ModelRequest("causal_lm")).leaves)
    found = outline(folder, ModelRequest("causal_lm", quant=quant and Quant(quant), **options))
    before = resident_bytes()
    asked, started, worked = found.meter.bytes, time.perf_counter(), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    params = jax.block_until_ready(found.read(0, places(found.leaves, way), cache=False))
    seconds, worked = time.perf_counter() - started, time.process_time() - worked
    peak = peak_bytes() - before
    parts = [
        {str(s.index): s.data.nbytes for s in leaf.addressable_shards}
        for leaf in jax.tree.leaves(params)
    ]
    held = sum(sum(part.values()) for part in parts)
    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    model = sum(leaf.size * leaf.dtype.itemsize for leaf in plain)
    if count > 1:
        jax.distributed.shutdown()
    figures = {
        "model_mb": model,
        "read_mb": found.meter.bytes - asked,
        "held_mb": held,
        "part_mb": model * held / stored,
        "largest_mb": max(max(part.values()) for part in parts),
        "peak_mb": peak,
        "above_mb": peak - held,
    }
    times = {"seconds": round(seconds, 2), "cpu_seconds": round(worked, 2)}
    return {key: round(value / 1e6, 2) for key, value in figures.items()} | times


def places(leaves: Any, way: str) -> Any:
    """Return the sharding of each leaf, over all devices; small leaves are replicated."""
    import jax
    import numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    from jaxpeft.core import paths

    mesh = Mesh(np.asarray(jax.devices()), "x")

    def one(path: tuple[str, ...], leaf: Any) -> NamedSharding:
        layers = len(paths.stacks(path))
        if len(leaf.shape) - layers < 2:
            return NamedSharding(mesh, PartitionSpec())
        rows, columns = (-1, -2) if path[-1] == "kernel" else (-2, -1)
        by_columns = (
            path[-2] in ("o_proj", "down_proj")
            if way == "tensor"
            else way == "columns" and "layers" in path
        )
        axis = columns if by_columns else rows
        spec = [None] * len(leaf.shape)
        spec[axis] = "x" if leaf.shape[axis] % mesh.size == 0 else None
        return NamedSharding(mesh, PartitionSpec(*spec))

    found = {path: one(path, leaf) for path, leaf in paths.walk(leaves)}
    return found.__getitem__


def peak_bytes() -> int:
    """Return the peak memory of this process since the peak was reset (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(
        next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    )


if __name__ == "__main__":
    main()
