"""Error of the gradients of a LoRA step in bfloat16, compared with float32, for every number format
of the base.

    python -m benchmarks.gradients [--layers 8] [--hidden 256]

Prints a JSON line per format: `||found - exact|| / ||exact||` of all trained leaves together, where
`exact` is computed in float32 on the decoded base, so that the error is that of the computation,
not of the stored kernels; and the loss of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxpeft
from benchmarks.step import COMMON
from jaxpeft import models
from jaxpeft.core import paths, tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.kernels import QUANTIZED
from jaxpeft.models.attention import fastest, platform
from jaxpeft.models.base import ModelOptions, abstract_params
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import make_loss_sum
from jaxpeft.transforms.rewrite import rewrite

ROWS, LENGTH, VOCAB = 2, 256, 4096


def main(argv: list[str]) -> None:
    """Compare every format."""
    parser = argparse.ArgumentParser(prog="benchmarks.gradients")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=256)
    given = parser.parse_args(argv)
    shape = {
        "hidden_size": given.hidden,
        "intermediate_size": 7 * given.hidden // 2,
        "num_hidden_layers": given.layers,
        "num_attention_heads": given.hidden // 64,
        "num_key_value_heads": given.hidden // 128,
        "vocab_size": VOCAB,
        "tie_word_embeddings": False,
    }
    kernel = fastest(platform(jax.devices()[0]))
    narrow = models.build(
        COMMON | shape,
        ModelOptions("causal_lm", None, jnp.bfloat16, attention=kernel, right_padded=True),
    )
    base = paths.build(
        [
            (path, _leaf(i, path, leaf))
            for i, (path, leaf) in enumerate(paths.walk(abstract_params(narrow)))
        ]
    )
    for form in (None, *QUANTIZED):
        held = base if form is None else jaxpeft.quantize(base, form)
        plain = base if form is None else jaxpeft.dequantize(held)
        sys.stdout.write(
            json.dumps({"base": form or "bf16", **compare(narrow, held, plain)}) + "\n"
        )


def _leaf(i: int, path: paths.Path, leaf: Any) -> Any:
    if path[-1] == "scale":
        return jnp.ones(leaf.shape, jnp.bfloat16)
    return (0.02 * jax.random.normal(jax.random.key(i), leaf.shape)).astype(jnp.bfloat16)


def compare(model: Any, held: Any, plain: Any) -> dict[str, Any]:
    """Compare the gradients on a base, in bfloat16, with those on its decoded values, in float32.

    Args:
        model: a model that computes in bfloat16.
        held: the base, as stored.
        plain: the decoded base.
    """
    ids = jnp.asarray(np.random.default_rng(1).integers(0, VOCAB, (ROWS, LENGTH)), jnp.int32)
    batch = {
        "input_ids": ids,
        "attention_mask": jnp.ones_like(ids),
        "labels": ids,
        "weights": jnp.ones(ROWS),
    }
    wide = model.clone(
        options=dataclasses.replace(model.options, dtype=jnp.dtype(jnp.float32), attention="xla")
    )

    def gradients(model: Any, base: Any) -> Any:
        method = jaxpeft.LoRA(rank=16, targets="all-linear")
        rng = np.random.default_rng(2)
        params = paths.map_with_path(
            lambda path, leaf: (
                jnp.asarray(0.01 * rng.normal(size=leaf.shape), jnp.float32)
                if path[-1] == "lora_b"
                else leaf
            ),
            rewrite(method, base, jax.random.key(0)),
        )
        trainable, frozen = tree.partition(params, trainable_mask(method, params))
        run = jax.jit(
            jax.value_and_grad(make_loss_sum(model, loss_for("causal_lm", None)), has_aux=True)
        )
        (total, weight), found = run(trainable, frozen, batch, None)
        return float(total / weight), found

    with jax.default_matmul_precision("highest"):
        loss, exact = gradients(wide, plain)
    own, found = gradients(model, held)
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, found, exact)) / optax.tree.norm(exact)
    where = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    return {
        "error": round(float(gap), 5),
        "loss": round(own, 5),
        "loss_float32": round(loss, 5),
        **where,
    }


if __name__ == "__main__":
    main(sys.argv[1:])
