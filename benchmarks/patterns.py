"""CPU time to trace and compile the gradient of a model of unequal layers, scanned and unrolled.

python -m benchmarks.patterns [--layers 24] [--pattern 2] [--length 128]

The model is a narrow Qwen3-MoE on the CPU, of which one layer of each pattern has experts and the
others are dense. The gradient is that of LoRA of rank 8, without remat. One line of JSON is printed
for each way, and the relative difference of the norms of the two gradients. Each way is
tried on a single pattern before, whose times are not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.tree import combine, partition, stack_layers
from jaxpeft.models import build
from jaxpeft.models.base import ModelOptions, abstract_params

ARCHITECTURE = {
    "model_type": "qwen3_moe",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
}


def measure(model: Any, base: Any, ids: Any) -> tuple[dict[str, float], float]:
    """Return the CPU seconds of tracing, compiling and a run, the number of instructions of the
    program, and the norm of the gradient.
    """
    method = jaxpeft.LoRA(rank=8, targets=("q_proj", "v_proj", "o_proj"))
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    trainable, frozen = partition(params, trainable_mask(method, params))

    def loss(trainable: Any, frozen: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, combine(trainable, frozen), ids)))

    began = time.process_time()
    lowered = jax.jit(jax.grad(loss)).lower(trainable, frozen)
    traced = time.process_time()
    compiled = lowered.compile()
    done = time.process_time()
    jax.block_until_ready(compiled(trainable, frozen))
    second = time.process_time()
    gradient = jax.block_until_ready(compiled(trainable, frozen))
    seconds = {
        "trace_s": traced - began,
        "compile_s": done - traced,
        "run_s": time.process_time() - second,
        "instructions": compiled.as_text().count(" = "),
    }
    norm = sum(float(jnp.sum(jnp.square(leaf))) for leaf in jax.tree.leaves(gradient)) ** 0.5
    return {name: round(value, 3) for name, value in seconds.items()}, norm


def main(argv: list[str]) -> None:
    """Print a line of JSON for scanned and for unrolled layers."""
    parser = argparse.ArgumentParser(prog="benchmarks.patterns")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--pattern", type=int, default=2)
    parser.add_argument("--length", type=int, default=128)
    given = parser.parse_args(argv)
    ids = np.random.default_rng(0).integers(0, 512, (1, given.length)).astype(np.int32)
    norms: list[float] = []
    for scan in (True, False):
        tried(scan, given.pattern, given.pattern, ids)
        seconds, norm = tried(scan, given.layers, given.pattern, ids)
        norms.append(norm)
        row = {"layers": "scanned" if scan else "unrolled", "count": given.layers}
        row |= {"pattern": given.pattern, **seconds, "gradient_norm": norm}
        sys.stdout.write(json.dumps(row) + "\n")
    sys.stdout.write(json.dumps({"difference": abs(norms[0] - norms[1]) / norms[1]}) + "\n")


def tried(scan: bool, layers: int, pattern: int, ids: Any) -> tuple[dict[str, float], float]:
    """Return what `measure` does for a model with random weights, the same in both ways."""
    config = {**ARCHITECTURE, "num_hidden_layers": layers, "decoder_sparse_step": pattern}
    unrolled, model = (
        build(config, ModelOptions("causal_lm", None, jnp.float32, scan_layers=each))
        for each in (False, scan)
    )
    shapes = abstract_params(unrolled)
    rng = np.random.default_rng(0)
    base = paths.map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.normal(path[-1] == "scale", 0.02, leaf.shape), leaf.dtype
        ),
        shapes,
    )
    base = stack_layers(base, abstract_params(model)) if scan else base
    return measure(model, base, ids)


if __name__ == "__main__":
    main(sys.argv[1:])
