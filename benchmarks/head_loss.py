"""Memory of the head and the loss of a language model in a step: in chunks, as in a run, and with
full logits.

    python -m benchmarks.head_loss [--vocab 256000] [--tokens 8192] [--hidden 4096]

Prints a JSON line for each variant. `temporaries_gib` is the size of the temporaries in the
compiled program of the loss and its gradients, without arguments and results (the gradient of the
hidden states is a result); `peak_gib` is the memory that the device reports above that in use
before, if it reports any. `ms` is the median of ten calls. The head is frozen, as with LoRA.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.train import compiling
from jaxpeft.train.head_loss import MOST_LOGITS, CrossEntropy, through_head

GIB = 2**30


def main(argv: list[str]) -> None:
    """Measure both variants, the chunks first, since a device reports only its highest peak."""
    parser = argparse.ArgumentParser(prog="benchmarks.head_loss")
    parser.add_argument("--vocab", type=int, default=256_000)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=4096)
    o = parser.parse_args(argv)
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (1, o.tokens, o.hidden)).astype(jnp.bfloat16)
    kernel = jax.jit(
        lambda key: (0.02 * jax.random.normal(key, (o.hidden, o.vocab))).astype(jnp.bfloat16)
    )(keys[1])
    labels = jax.random.randint(keys[2], (1, o.tokens), 0, o.vocab, jnp.int32)
    for name, most in (("chunks", MOST_LOGITS), ("whole", o.tokens * o.vocab)):
        line = measured(x, kernel, labels, most)
        told = {"way": name, "vocab": o.vocab, "tokens": o.tokens, "hidden": o.hidden, **line}
        sys.stdout.write(
            json.dumps(told | {"device": jax.devices()[0].device_kind, "jax": jax.__version__})
            + "\n"
        )
        sys.stdout.flush()


def measured(x: Any, kernel: Any, labels: Any, most: int) -> dict[str, Any]:
    """Measure the loss of hidden states `[1, tokens, d]` and its gradient by them, in chunks of
    `most` logits.
    """

    def loss(x: Any, kernel: Any, labels: Any) -> Any:
        weights = jnp.ones(labels.shape, jnp.float32)
        total, count = through_head(
            CrossEntropy(),
            lambda rows, _: (rows @ kernel).astype(jnp.float32),
            x,
            labels,
            weights,
            most,
        )
        return total / count

    device = jax.devices()[0]
    before = (device.memory_stats() or {}).get("bytes_in_use", 0)
    lowered = jax.jit(jax.value_and_grad(loss)).lower(x, kernel, labels)
    compiled = lowered.compile(compiler_options=compiling.options(device))
    seconds: list[float] = []
    found: Any = None
    for _ in range(12):
        start = time.perf_counter()
        found = jax.block_until_ready(compiled(x, kernel, labels))
        seconds.append(time.perf_counter() - start)
    planned, peak = (
        compiled.memory_analysis(),
        (device.memory_stats() or {}).get("peak_bytes_in_use"),
    )
    return {
        "temporaries_gib": round(planned.temp_size_in_bytes / GIB, 3) if planned else None,
        "peak_gib": None if peak is None else round((peak - before) / GIB, 3),
        "ms": round(1e3 * statistics.median(seconds[2:]), 2),
        "loss": round(float(found[0]), 4),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
