"""Memory of a step, predicted and measured, on one GPU:
`python -m benchmarks.memory [--only NAME ...] [--beside FILE]`.

Three figures for each configuration: `predicted`, as `python -m jaxpeft.plan --topology h100:1`
computes it, without a GPU; `compiled`, the memory of the step compiled for this GPU, according to
XLA; `measured`, the peak of the allocator over a few steps. Each is measured in a separate process,
with its own peak. The weights are random numbers of the model's shape, the step is that of the
training job. Prints one JSON line each.

`--beside FILE` needs no GPU: it predicts the LoRA measurements of `benchmarks.step` in FILE.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

GIB = 2**30
CASES: Mapping[str, Mapping[str, Any]] = {
    "8b-products": {
        "shape": "llama3_8b",
        "batch": 4,
        "length": 2048,
        "quant": "none",
        "remat": "products",
    },
    "8b-full": {"shape": "llama3_8b", "batch": 8, "length": 2048, "quant": "none", "remat": "full"},
    "8b-nf4-full": {
        "shape": "llama3_8b",
        "batch": 4,
        "length": 2048,
        "quant": "nf4",
        "remat": "full",
    },
    "1b-attention": {
        "shape": "llama3_1b",
        "batch": 16,
        "length": 1024,
        "quant": "none",
        "remat": "attention",
    },
    "tiny": {"shape": "tiny", "batch": 2, "length": 128, "quant": "none", "remat": "products"},
}
"""By name; `tiny` is to try the program with, on a CPU too."""
TINY = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
CONFIG = """
from jaxpeft.config import defaults


def get_config():
    config = defaults("lora")
    config.method.rank = 16
    config.model.path = "random"
    config.data.train = "random"
    config.train.steps = 1000
    return config
"""


def main(argv: list[str]) -> None:
    """Measure each configuration in a separate process."""
    parser = argparse.ArgumentParser(prog="benchmarks.memory")
    parser.add_argument(
        "--only",
        nargs="*",
        choices=sorted(CASES),
        default=[name for name in CASES if name != "tiny"],
    )
    parser.add_argument("--here", help="measure this one in this process")
    parser.add_argument(
        "--beside", type=Path, help="lines of benchmarks.step, to predict what they have measured"
    )
    options = parser.parse_args(argv)
    if options.beside:
        for line in options.beside.read_text().splitlines():
            row = json.loads(line)
            if row["program"] == "jaxpeft" and row["method"] == "lora":
                emit(beside(row))
        return
    if options.here:
        emit(measured(options.here))
        return
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.memory", "--here", name]
        done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
        emit(
            json.loads(done.stdout)
            if done.returncode == 0
            else {"case": name, "failed": done.returncode}
        )


def emit(line: Mapping[str, Any]) -> None:
    """Print one JSON line."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def beside(row: Mapping[str, Any]) -> dict[str, Any]:
    """Predict the memory of a measurement by `benchmarks.step`."""
    import jax

    from jaxpeft.plan import topology
    from jaxpeft.plan.examine import Setting, predict_bytes
    from jaxpeft.plan.shapes import SHAPES

    gpu = topology.read("h200:1" if "H200" in row["device"] else "h100:1")
    by_arithmetic = predict_bytes(
        Setting(SHAPES[row["shape"]], gpu, jax.devices()[:1], None, False), config_of(row)
    )
    return {
        **{key: row[key] for key in ("shape", "batch", "length", "quant", "remat", "layers")},
        "predicted_gib": _gib(by_arithmetic),
        "compiled_gib": row["planned_gib"],
        "measured_gib": row["peak_gib"],
        "predicted_by_measured": round(by_arithmetic / GIB / row["peak_gib"], 4),
        "device": row["device"],
        "jax": row["jax"],
    }


def measured(name: str) -> dict[str, Any]:
    """Predict, compile and run one configuration."""
    import jax

    from jaxpeft.models.attention import fastest, platform
    from jaxpeft.plan import topology
    from jaxpeft.plan.examine import Setting, predict_bytes, step_of
    from jaxpeft.plan.shapes import SHAPES
    from jaxpeft.plan.step_arguments import step_arguments
    from jaxpeft.plan.subject import subject
    from jaxpeft.sharding.mesh import make_mesh
    from jaxpeft.train import compiling

    case, device = CASES[name], jax.devices()[0]
    described = SHAPES.get(case["shape"], TINY)
    config = config_of(case)
    by_arithmetic = predict_bytes(
        Setting(described, topology.read("h100:1"), [device], None, False), config
    )
    run = subject(config, described, fastest(platform(device)), case["remat"], scan=False)
    mesh = make_mesh(config, [device])
    state, frozen, batch = made(run, case["batch"])
    before = peak_of(device)
    step = step_of(run, step_arguments(run, mesh), mesh)
    compiled = step.lower(state, frozen, batch).compile(compiler_options=compiling.options(device))
    for _ in range(3):
        state, metrics = compiled(state, frozen, batch)
        jax.block_until_ready(metrics)
    took = compiled.memory_analysis()
    total = (
        took.argument_size_in_bytes
        + took.output_size_in_bytes
        - took.alias_size_in_bytes
        + took.temp_size_in_bytes
    )
    peak = peak_of(device)
    return {
        "case": name,
        **case,
        "predicted_gib": _gib(by_arithmetic),
        "compiled_gib": _gib(total),
        "measured_gib": _gib(peak),
        "before_gib": _gib(before),
        "predicted_by_measured": round(by_arithmetic / peak, 4) if peak else None,
        "compiled_by_measured": round(total / peak, 4) if peak else None,
        "loss": round(float(metrics["loss"]), 4),
        "attention": run.model.options.attention,
        "device": device.device_kind,
        "jax": jax.__version__,
    }


def made(run: Any, rows: int) -> tuple[Any, Any, Any]:
    """Make the arguments of a step: random numbers of the shapes of a run, leaf by leaf."""
    import jax
    import jax.numpy as jnp

    from jaxpeft.core import paths, tree
    from jaxpeft.core.rewriting import trainable_mask
    from jaxpeft.train.step import init_state
    from jaxpeft.transforms.rewrite import rewrite

    def leaf(path: tuple[str, ...], shape: Any) -> Any:
        key = jax.random.key(hash(path) % 2**31)
        if shape.dtype == jnp.uint8:
            return jax.jit(lambda key: jax.random.bits(key, shape.shape, jnp.uint8))(key)
        if path[-1] == "scale":
            return jnp.ones(shape.shape, shape.dtype)
        return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape.shape, shape.dtype))(key)

    config = run.config
    base = paths.map_with_path(leaf, run.base)
    params = jax.jit(
        lambda base: rewrite(config.method, base, jax.random.key(0)), donate_argnums=0
    )(base)
    trainable, frozen = tree.partition(params, trainable_mask(config.method, params))
    state = jax.jit(lambda leaves: init_state(leaves, run.optimizer, 0), donate_argnums=0)(
        trainable
    )
    ids = jax.random.randint(
        jax.random.key(1), run.batch["input_ids"].shape, 0, run.model.config.vocab_size
    )
    weights = jnp.ones(rows, jnp.float32)
    return (
        state,
        frozen,
        {"input_ids": ids, "attention_mask": jnp.ones_like(ids), "labels": ids, "weights": weights},
    )


def peak_of(device: Any) -> int:
    """Return the peak of the allocator so far, or 0 if it reports none."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)


def config_of(case: Mapping[str, Any]) -> Any:
    """Return the config of a case."""
    from jaxpeft.config import load

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "memory.py"
        file.write_text(CONFIG)
        given = {
            "train.batch_size": case["batch"],
            "data.max_length": case["length"],
            "model.quant": case["quant"],
            "model.remat": case["remat"],
            "evaluation.batch_size": case["batch"],
        }
        return load(file, [(option, str(value)) for option, value in given.items()])


def _gib(nbytes: float) -> float:
    return round(nbytes / GIB, 3)


if __name__ == "__main__":
    main(sys.argv[1:])
