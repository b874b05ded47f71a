"""Attention a block of keys after the other: the numbers and the gradients of the whole, in the
memory of a block.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models.attention import KERNELS
from jaxpeft.models.attention_scores import Scoring
from jaxpeft.models.chunked_attention import LEAST_KEYS, MOST_SCORES, block_of, compute
from jaxpeft.models.masks import Mask
from tests.models.test_attention import MASKS, masks, with_gradient

LENGTH = 96


def inputs(rng: np.random.Generator, kv_heads: int, dtype: Any = jnp.float32) -> Any:
    return tuple(
        jnp.asarray(rng.normal(size=(2, LENGTH, n, 8)), dtype) for n in (4, kv_heads, kv_heads)
    )


@pytest.mark.parametrize("block", [16, 40, 96])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.representatives("causal-4-40", "packed-4-16", "padded-1-40", "window-4-16")
def test_it_is_the_reference_with_its_gradients(kind: str, kv_heads: int, block: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, kv_heads)
    mask, text = masks(kind, rng, LENGTH)
    found = with_gradient(partial(compute, block=block), q, k, v, mask, text)
    right = with_gradient(KERNELS["xla"].compute, q, k, v, mask, text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


@pytest.mark.parametrize("kind", ["causal", "padded", "window"])
@pytest.mark.representatives("padded")
def test_scaled_and_bounded_scores_are_those_of_the_reference(kind: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, 2)
    mask, text = masks(kind, rng, LENGTH)
    scoring = Scoring(scale=0.7, cap=1.5)
    found, right = (
        with_gradient(partial(kernel, scoring=scoring, **more), q, k, v, mask, text)
        for kernel, more in ((compute, {"block": 40}), (KERNELS["xla"].compute, {}))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


@pytest.mark.parametrize("size", [4, 16])
@pytest.mark.representatives("16")
def test_values_may_have_another_size_than_keys(size: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, 2)
    v = jnp.asarray(rng.normal(size=(*v.shape[:3], size)), jnp.float32)
    mask, text = masks("padded", rng, LENGTH)
    found = with_gradient(partial(compute, block=40), q, k, v, mask, text)
    right = with_gradient(KERNELS["xla"].compute, q, k, v, mask, text)
    assert found[0].shape == (2, LENGTH, 4, size)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.representatives("window")
def test_sinks_have_the_numbers_and_gradients_of_the_reference(kind: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, 2)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    mask, text = masks(kind, rng, LENGTH)

    def run(kernel: Any) -> Any:
        def loss(q: Any, k: Any, v: Any, sinks: Any) -> Any:
            out = kernel(q, k, v, mask, lambda weights: weights, sinks=sinks)
            return jnp.sum(jnp.sin(jnp.where(text[..., None, None], out, 0)))

        return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(q, k, v, sinks)

    found, right = run(partial(compute, block=40)), run(KERNELS["xla"].compute)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, right)
    assert np.abs(right[1][3]).min() > 1e-3


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.representatives("packed")
def test_some_of_the_queries_are_those_of_the_row(kind: str) -> None:
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, 2)
    mask, text = masks(kind, rng, LENGTH)

    def parts(q: Any, k: Any, v: Any, mask: Mask, drop: Any) -> Any:
        del drop
        own = [
            compute(q[:, at : at + 24], k, v, mask, first=jnp.int32(at), block=32)
            for at in range(0, LENGTH, 24)
        ]
        return jnp.concatenate(own, axis=1)

    found = with_gradient(parts, q, k, v, mask, text)
    right = with_gradient(KERNELS["xla"].compute, q, k, v, mask, text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, right)


@pytest.mark.slow
@pytest.mark.parametrize("block", [32, 40])
@pytest.mark.representatives("40")
def test_a_row_that_sees_nothing_gives_an_average(block: int) -> None:
    q, k, v = inputs(np.random.default_rng(0), 4)
    mask = Mask(text=jnp.zeros((2, LENGTH), bool))
    out = compute(q, k, v, mask, block=block)
    np.testing.assert_allclose(
        out, jnp.broadcast_to(v.mean(1, keepdims=True), out.shape), rtol=1e-5, atol=1e-6
    )
    grads = jax.grad(lambda *qkv: compute(*qkv, mask, block=block).sum(), argnums=(0, 1, 2))(
        q, k, v
    )
    np.testing.assert_array_equal(grads[0], 0)
    np.testing.assert_allclose(grads[2], 1.0, rtol=1e-5)


def test_in_bfloat16_it_is_as_near_as_the_reference() -> None:
    rng = np.random.default_rng(0)
    exact = inputs(rng, 2)
    mask, text = masks("causal", rng, LENGTH)
    right = with_gradient(KERNELS["xla"].compute, *exact, mask, text)
    halved = tuple(array.astype(jnp.bfloat16) for array in exact)

    def gaps(kernel: Any) -> list[float]:
        found = with_gradient(kernel, *halved, mask, text)
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True)
        return [
            float(jnp.linalg.norm(a.astype(jnp.float32) - b) / jnp.linalg.norm(b)) for a, b in pairs
        ]

    own, plain = gaps(partial(compute, block=32)), gaps(KERNELS["xla"].compute)
    assert all(a < 1.3 * b + 1e-4 for a, b in zip(own, plain, strict=True)), (own, plain)


def test_no_scores_are_written_out() -> None:
    length, heads = 2048, 2
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 8), jnp.float32)] * 3

    def temporaries(kernel: Any) -> int:
        def loss(q: Any, k: Any, v: Any) -> Any:
            return jnp.sum(jnp.sin(kernel(q, k, v, Mask(causal=True), lambda weights: weights)))

        found = (
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes).compile().memory_analysis()
        )
        return found.temp_size_in_bytes

    scores = 4 * heads * length * length
    assert temporaries(KERNELS["xla"].compute) > scores
    assert temporaries(partial(compute, block=128)) < scores / 3


def test_a_block_is_as_large_as_memory_is_well_used_with() -> None:
    assert block_of(100, 64) == 64
    assert block_of(MOST_SCORES // 512, 10_000) == 512
    assert block_of(MOST_SCORES // 600, 10_000) == 512
    assert block_of(MOST_SCORES, 10_000) == LEAST_KEYS
