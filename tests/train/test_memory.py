"""What a step is estimated to take, and what follows from it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxpeft
from jaxpeft.core import tree
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.quant.quantize import Quant
from jaxpeft.train import memory
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import make_loss_sum

ROWS, LENGTH = 4, 32


@pytest.fixture
def llama(tiny_models: Any) -> Path:
    return tiny_models["llama"]


def test_what_policies_keep_grows_by_what_xla_keeps(llama: Path) -> None:
    outlined = outline(llama, ModelRequest("causal_lm"))
    needs = memory.estimate(outlined, 1000, ROWS, LENGTH)
    assert needs.kept["full"] < needs.kept["attention"] < needs.kept["products"]
    assert needs.base == sum(leaf.size * 4 for leaf in jax.tree.leaves(outlined.abstract))
    assert needs.trained == 16_000
    config = outlined.model.config
    stream = ROWS * LENGTH * config.hidden_size * 4
    assert needs.kept["full"] == config.num_hidden_layers * stream
    heads = (
        config.num_attention_heads * config.head_dim,
        config.num_key_value_heads * config.head_dim,
    )
    widths = heads[0] + 2 * heads[1] + heads[0] + config.hidden_size + 2 * config.intermediate_size
    wide = needs.kept["products"] - needs.kept["full"]
    assert wide == config.num_hidden_layers * ROWS * LENGTH * widths * 4


def test_a_quantized_base_counts_as_it_is_stored(llama: Path) -> None:
    outlined = outline(llama, ModelRequest("causal_lm", quant=Quant("nf4")))
    _, params = jaxpeft.load(llama, task="causal_lm", quant="nf4")
    assert memory.estimate(outlined, 0, ROWS, LENGTH).base == sum(
        leaf.nbytes for leaf in jax.tree.leaves(params)
    )


def test_the_policy_that_fits_and_computes_least_again(llama: Path) -> None:
    needs = memory.estimate(outline(llama, ModelRequest("causal_lm")), 0, ROWS, LENGTH)
    assert needs.fastest(1e12) == "products"
    assert needs.fastest(needs.total("products") - 1) == "attention"
    assert needs.fastest(needs.total("attention") - 1) == "full"
    assert needs.fastest(0) == "full"


def test_a_cpu_has_no_budget_of_its_own() -> None:
    assert memory.budget_of(jax.devices()[0], None) is None
    assert memory.budget_of(jax.devices()[0], 2.5) == 2.5e9


def test_the_estimate_is_near_what_the_compiled_gradient_keeps(llama: Path) -> None:
    """Of a model whose activations outweigh all else: the difference of two lengths is what a token
    keeps.
    """
    outlined = outline(llama, ModelRequest("causal_lm"))
    method = jaxpeft.LoRA(rank=2)
    params = jax.eval_shape(
        lambda base: jaxpeft.rewrite(method, base, jax.random.key(0)), outlined.abstract
    )
    trainable, frozen = tree.partition(
        params, jaxpeft.core.rewriting.trainable_mask(method, params)
    )

    def kept(policy: str, length: int) -> int:
        options = dataclasses.replace(outlined.model.options, remat=policy)
        loss = make_loss_sum(outlined.model.clone(options=options), loss_for("causal_lm", None))
        ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32)
        batch = {
            "input_ids": ids,
            "attention_mask": ids,
            "labels": ids,
            "weights": jax.ShapeDtypeStruct((ROWS,), jnp.float32),
        }
        back = jax.eval_shape(
            lambda t, f, b: jax.vjp(lambda t: loss(t, f, b, None)[0], t)[1],
            trainable,
            frozen,
            batch,
        )
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(back))

    token = (kept("products", 48) - kept("products", 32)) / 16
    short, long = (
        memory.estimate(outlined, 0, ROWS, length).kept["products"] for length in (32, 48)
    )
    assert 0.7 < token / ((long - short) / 16) < 1.4
