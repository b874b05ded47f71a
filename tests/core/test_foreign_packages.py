"""Models of packages from PyPI, written by people who know nothing of jaxpeft: adapted, trained,
merged.
"""

from __future__ import annotations

import types
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxpeft
from tests.core.test_foreign import moved

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the packages' own code


INPUT = jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 32)), jnp.float32)
TARGET = jnp.asarray(np.random.default_rng(1).normal(size=(2, 6, 32)), jnp.float32)


def close(a: Any, b: Any) -> None:
    np.testing.assert_allclose(
        a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(jnp.asarray(b)).max() + 1)
    )


def trained(run: Any, method: Any, params: Any) -> tuple[float, float]:
    """Train the adapter towards a target for a few steps; return the first loss and the last."""
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    optimizer = optax.adam(1e-2)
    state = optimizer.init(trainable)

    @jax.jit
    def step(t: Any, s: Any) -> Any:
        loss, grads = jax.value_and_grad(
            lambda t: jnp.mean(jnp.square(run(jaxpeft.combine(t, frozen)) - TARGET))
        )(t)
        updates, s = optimizer.update(grads, s)
        return optax.apply_updates(t, updates), s, loss

    losses = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(8):
            trainable, state, loss = step(trainable, state)
            losses.append(float(loss))
    return losses[0], losses[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [jaxpeft.LoRA(rank=2), jaxpeft.DoRA(rank=2)], ids=lambda m: m.name
)
def test_the_feed_forward_of_gpt2_of_flaxmodels(method: Any) -> None:
    from flaxmodels.gpt2 import gpt2

    config = types.SimpleNamespace(
        n_embd=32, resid_pdrop=0.0, n_inner=None, activation_function="gelu_new"
    )
    model, x = gpt2.GPT2MLP(64, config), INPUT
    with jax.numpy_dtype_promotion("standard"):
        base = model.init(jax.random.key(0), x)["params"]
        sites = jaxpeft.find_sites(model, base, x)
        assert [site.kind for site in sites] == ["linear", "linear"]
        fresh = jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites)
        params = moved(method, fresh)
        close(
            model.apply({"params": jaxpeft.merge(method, params, sites=sites)}, x),
            jaxpeft.apply(model, params, x),
        )
        first, last = trained(lambda p: jaxpeft.apply(model, p, x), method, fresh)
        assert last < first


@pytest.mark.parametrize(
    "method", [jaxpeft.LoRA(rank=2), jaxpeft.LoHa(rank=2)], ids=lambda m: m.name
)
@pytest.mark.slow  # test_foreign has a small module with statistics
def test_resnet_of_flaxmodels_with_its_statistics(method: Any) -> None:
    import flaxmodels

    model = flaxmodels.ResNet18(output="logits", pretrained=None, num_classes=5, normalize=False)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 16, 3)), jnp.float32)
    made = jax.jit(partial(model.init, train=False))(jax.random.key(0), x)
    base, rest = made["params"], {"batch_stats": made["batch_stats"]}
    sites = jaxpeft.find_sites(model, base, x, variables=rest, train=False)
    assert sum(site.kind == "linear" for site in sites) == 21
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites)
    params = moved(method, fresh)
    run = jax.jit(lambda p: jaxpeft.apply(model, p, x, variables=rest, train=False))
    close(run(jaxpeft.merge(method, params, sites=sites)), run(params))
    plain = jax.jit(partial(model.apply, train=False))(made, x)
    np.testing.assert_allclose(run(fresh), plain, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [jaxpeft.LoRA(rank=2), jaxpeft.OFT(block_size=4)], ids=lambda m: m.name
)
def test_a_transformer_block_of_fabrique(method: Any) -> None:
    from fabrique.models.bert.modeling import ModelArgs, TransformerBlock

    args = ModelArgs(
        dim=32, n_layers=2, n_heads=4, vocab_size=50, ffn_hidden_size=48, max_seq_len=16
    )
    model = TransformerBlock(args, rngs=nnx.Rngs(0))
    x, mask = INPUT, jnp.ones((2, 6), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):
        base, before = jaxpeft.params_of(model), model(x, mask, deterministic=True)
        sites = jaxpeft.find_sites(model, base)
        fresh = jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites)
        params = moved(method, fresh)
        out = jaxpeft.apply(model, params, x, mask, deterministic=True)
        assert float(jnp.abs(out - before).max()) > 1e-2
        folded = jaxpeft.with_params(model, jaxpeft.merge(method, params, sites=sites))
        close(folded(x, mask, deterministic=True), out)
        first, last = trained(
            lambda p: jaxpeft.apply(model, p, x, mask, deterministic=True), method, fresh
        )
        assert last < first
