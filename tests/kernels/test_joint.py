"""Sites that read the same input, computed at once: against each by itself, by the definition."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.kernels import QUANTIZED
from jaxpeft.kernels.joint import LinearSite, products
from tests.core.helpers import load, run

RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, *QUANTIZED])
@pytest.mark.representatives("nf4")
def test_they_are_the_sums_of_both_products_and_so_are_the_gradients(form: str | None) -> None:
    x, kernels = normal(2, 5, 64), [normal(64, n) / 8 for n in (24, 8, 40)]
    stored = [{"kernel": k} if form is None else QUANTIZED[form].store(k) for k in kernels]
    exact = [
        k if form is None else QUANTIZED[form].read(leaves)
        for k, leaves in zip(kernels, stored, strict=True)
    ]
    factors = [(normal(64, 3), normal(3, 24)), None, (normal(64, 2), normal(2, 40))]
    bias = normal(8)
    wanted = [normal(2, 5, n) for n in (24, 8, 40)]

    def joint(x: Any, factors: Any, bias: Any) -> Any:
        sites = [
            LinearSite(*pair, bias=extra)
            for *pair, extra in zip(stored, factors, (None, bias, None), strict=True)
        ]
        return sum(jnp.vdot(y, w) for y, w in zip(products(x, sites), wanted, strict=True))

    def apart(x: Any, factors: Any, bias: Any) -> Any:
        ys = [
            x @ k if own is None else x @ k + x @ own[0] @ own[1]
            for k, own in zip(exact, factors, strict=True)
        ]
        ys[1] = ys[1] + bias
        return sum(jnp.vdot(y, w) for y, w in zip(ys, wanted, strict=True))

    found = jax.jit(jax.value_and_grad(joint, (0, 1, 2)))(x, factors, bias)
    right = jax.value_and_grad(apart, (0, 1, 2))(x, factors, bias)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, right)


def test_a_kernel_that_is_trained_has_its_gradient() -> None:
    x, kernel, a, b = normal(4, 6), normal(6, 5), normal(6, 2), normal(2, 5)
    found = jax.grad(lambda k: products(x, [LinearSite({"kernel": k}, (a, b))])[0].sum())(kernel)
    np.testing.assert_allclose(found, np.asarray(x).sum(0)[:, None].repeat(5, 1), rtol=1e-5)


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "v_proj"), ("k_proj",), ("down_proj", "up_proj")]
)
def test_a_model_gives_what_its_merged_tree_gives(targets: Any) -> None:
    model, base = load("llama")
    params = jaxpeft.rewrite(
        jaxpeft.LoRA(rank=4, targets=targets, init_weights="gaussian"), base, jax.random.key(0)
    )
    filled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: normal(*leaf.shape) / 20 if path[-1].key == "lora_b" else leaf, params
    )
    merged = jaxpeft.merge(jaxpeft.LoRA(rank=4, targets=targets), filled)
    np.testing.assert_allclose(run(model, filled), run(model, merged), atol=2e-4)


def test_what_reads_the_same_input_is_multiplied_once() -> None:
    model, base = load("llama")
    width = base["model"]["embed_tokens"]["embedding"].shape[1]

    def narrow(rank: int, **options: Any) -> int:
        params = jaxpeft.rewrite(jaxpeft.LoRA(rank=rank, **options), base, jax.random.key(0))
        text = (
            jax.jit(lambda p: jaxpeft.apply(model, p, jnp.ones((1, 4), jnp.int32)))
            .lower(params)
            .as_text()
        )
        return len(re.findall(rf"dot_general.*tensor<{width}x{3 * rank}xf32>", text))

    layers = model.config.num_hidden_layers
    assert narrow(5, targets=("q_proj", "k_proj", "v_proj")) == layers
    # one of them is computed otherwise: then each is by itself
    assert narrow(5, targets=("q_proj", "k_proj", "v_proj"), lora_bias=True) == 0
