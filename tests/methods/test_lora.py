"""LoRA's own: the low-rank product and its gradient, scaling, dropout."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.methods.low_rank import low_rank

RNG = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("lead", [(5,), (3, 5), (2, 3, 5), ()])
def test_the_product_and_its_gradients_are_those_of_the_plain_products(
    lead: tuple[int, ...],
) -> None:
    given = random(*lead, 8), random(8, 2), random(2, 6)
    np.testing.assert_allclose(low_rank(*given), (given[0] @ given[1]) @ given[2], rtol=1e-6)
    ours = jax.grad(lambda *xab: jnp.sum(jnp.sin(low_rank(*xab))), (0, 1, 2))(*given)
    plain = jax.grad(lambda x, a, b: jnp.sum(jnp.sin((x @ a) @ b)), (0, 1, 2))(*given)
    for one, other in zip(ours, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_gradients_of_float32_adapters_in_bfloat16_compute_are_float32() -> None:
    x, a, b = random(4, 8).astype(jnp.bfloat16), random(8, 2), random(2, 6)
    assert low_rank(x, a, b).dtype == jnp.bfloat16
    grads = jax.grad(lambda *xab: jnp.sum(low_rank(*xab).astype(jnp.float32)), (0, 1, 2))(x, a, b)
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.float32, jnp.float32]
    exact = jax.grad(lambda b: jnp.sum((x.astype(jnp.float32) @ a) @ b))(b)
    np.testing.assert_allclose(grads[2], exact, rtol=0.05, atol=0.05)


def test_the_product_works_under_vmap() -> None:
    x, a, b = random(4, 3, 8), random(4, 8, 2), random(4, 2, 6)
    np.testing.assert_allclose(jax.vmap(low_rank)(x, a, b), (x @ a) @ b, rtol=1e-5)
    grads = jax.vmap(jax.grad(lambda a, x, b: jnp.sum(low_rank(x, a, b))))(a, x, b)
    assert grads.shape == a.shape


@pytest.mark.parametrize(("rslora", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_the_scaling(rslora: bool, scale: float) -> None:
    method = jaxpeft.LoRA(
        rank=4, alpha=16, rslora=rslora, alpha_pattern={"k_proj": 2.0}, rank_pattern={"v_proj": 16}
    )
    assert method.site_scale("model.layers.0.q_proj") == scale
    assert method.site_scale("model.layers.0.k_proj") == scale / 8
    assert method.site_scale("model.layers.0.v_proj") == (16 / 4 if rslora else 16 / 16)


def dense_site(dropout: float) -> tuple[Any, Any]:
    model = nn.Dense(6, name="proj")

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(6, name="proj")(x)

    del model
    holder = Holder()
    base = holder.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    params = jaxpeft.rewrite(jaxpeft.LoRA(rank=2, dropout=dropout), base, jax.random.key(1))
    params["proj"]["lora_b"] = random(2, 6)
    return holder, params


def call(model: Any, params: Any, x: jax.Array, key: jax.Array | None) -> jax.Array:
    return jaxpeft.apply(model, params, x, rngs=None if key is None else {"dropout": key})


def test_dropout_is_on_the_adapters_input_alone_in_a_training_call_and_unbiased() -> None:
    model, params = dense_site(0.5)
    x = random(3, 8)
    plain = call(model, params, x, None)
    _, without = dense_site(0.0)
    without["proj"] |= {"lora_b": params["proj"]["lora_b"]}
    np.testing.assert_array_equal(plain, call(model, without, x, None))
    calls = jax.vmap(lambda key: call(model, params, x, key))(
        jax.random.split(jax.random.key(2), 4000)
    )
    assert float(jnp.abs(calls[0] - calls[1]).max()) > 0.01
    spread = np.asarray(calls).std(axis=0) / np.sqrt(4000)
    assert (np.abs(np.asarray(calls).mean(axis=0) - plain) < 5 * spread + 1e-5).all()

    params["proj"]["lora_b"] = jnp.zeros((2, 6))  # the base's own path is never dropped
    np.testing.assert_array_equal(
        call(model, params, x, jax.random.key(3)), call(model, params, x, None)
    )


def test_a_starts_uniform_within_the_bound_and_b_at_zero() -> None:
    _, params = dense_site(0.0)
    a = np.asarray(params["proj"]["lora_a"])
    assert np.abs(a).max() <= 1 / np.sqrt(8)
    assert np.abs(a).max() > 0.5 / np.sqrt(8)


def test_lora_plus_multiplies_the_updates_of_b_alone() -> None:
    from jaxpeft.config.train_config import OptimizerConfig
    from jaxpeft.train import optimizers

    _, params = dense_site(0.0)
    options = OptimizerConfig(name="sgd", learning_rate=0.1, clip_norm=None, schedule="constant")
    grads = {"proj": {"lora_a": jnp.ones((8, 2)), "lora_b": jnp.ones((2, 6))}}
    trained = {"proj": {name: params["proj"][name] for name in ("lora_a", "lora_b")}}
    found = {}
    for ratio in (1.0, 16.0):
        optimizer = optimizers.build(options, 10, jaxpeft.LoRA(rank=2, lora_plus_ratio=ratio))
        found[ratio], _ = optimizer.update(grads, optimizer.init(trained), trained)
    np.testing.assert_array_equal(found[16.0]["proj"]["lora_a"], found[1.0]["proj"]["lora_a"])
    np.testing.assert_allclose(found[16.0]["proj"]["lora_b"], 16 * found[1.0]["proj"]["lora_b"])
