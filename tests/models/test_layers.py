"""Dropout and attention by themselves, against their definitions."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.kernels import few_rows
from jaxpeft.models.attention import attend
from jaxpeft.models.layers import Linear, dropout
from jaxpeft.models.masks import Mask


class _Dropped(nn.Module):
    rate: float

    def __call__(self, x: Any) -> Any:
        return dropout(self, self.rate, x)


class _Attended(nn.Module):
    rate: float = 0.0

    def __call__(self, q: Any, k: Any, v: Any, mask: Any = None) -> Any:
        return attend(self, "xla", q, k, v, Mask(mask), self.rate)


def drop(rate: float, x: Any, seed: int = 0) -> Any:
    return _Dropped(rate).apply({}, x, rngs={"dropout": jax.random.key(seed)})


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(500, 400), (1001, 201)], ids=["even", "odd"])
@pytest.mark.representatives("even-*", "odd-0.5", "odd-0.9")
def test_dropout_drops_its_share_and_keeps_the_mean(rate, shape):
    out = np.asarray(drop(rate, jnp.ones(shape)))
    n = out.size
    assert out.shape == shape
    assert abs((out == 0).mean() - rate) < 4 * np.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(out[out != 0], 1 / (1 - rate), rtol=1e-3)
    columns = (out == 0).mean(0)
    assert np.abs(columns - rate).max() < 6 * np.sqrt(rate * (1 - rate) / shape[0])


def test_neighbors_are_dropped_independently():
    zeros = np.asarray(drop(0.5, jnp.ones((2000, 64)))) == 0
    for step in (1, 2):
        both = (zeros[:, step:] == zeros[:, :-step]).mean()
        assert abs(both - 0.5) < 0.01


def test_dropout_without_a_key_or_rate_is_the_identity():
    x = jnp.arange(6.0).reshape(2, 3)
    assert _Dropped(0.5).apply({}, x) is x
    assert drop(0.0, x) is x


def test_dropout_keeps_the_dtype():
    assert drop(0.5, jnp.ones((2, 3), jnp.bfloat16)).dtype == jnp.bfloat16


def _by_hand(q: Any, k: Any, v: Any, mask: Any) -> Any:
    batch, length, heads, d = q.shape
    out = np.zeros((batch, length, heads, d))
    shared = heads // k.shape[2]
    for b, h in np.ndindex(batch, heads):
        scores = q[b, :, h] @ k[b, :, h // shared].T / np.sqrt(d)
        scores = np.where(mask[b, 0], scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, h] = weights / weights.sum(-1, keepdims=True) @ v[b, :, h // shared]
    return out.reshape(batch, length, heads * d)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.representatives("2")
def test_attention_is_its_definition(kv_heads):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 5, 6, 4)).astype(np.float32)
    k, v = rng.normal(size=(2, 2, 7, kv_heads, 4)).astype(np.float32)
    mask = rng.random((2, 1, 5, 7)) < 0.6
    mask[..., 0] = True
    np.testing.assert_allclose(
        _Attended().apply({}, q, k, v, mask), _by_hand(q, k, v, mask), atol=1e-5
    )


def test_a_row_that_may_see_nothing_gives_an_average():
    q, k, v = (
        np.ones((3, 1, 2, 1, 4), np.float32)
        * np.arange(2, dtype=np.float32)[None, None, :, None, None]
    )
    out = _Attended().apply({}, q, k, v, np.zeros((1, 1, 2, 2), bool))
    np.testing.assert_allclose(out, np.full((1, 2, 4), 0.5))


class _Together(nn.Module):
    def setup(self) -> None:
        self.first, self.second = (
            Linear(width, use_bias=False, dtype=jnp.bfloat16) for width in (64, 128)
        )

    def __call__(self, x: Any) -> tuple[Any, ...]:
        return self.first.together(x, self.second)


@pytest.mark.parametrize("backend", ["gpu", "cpu"])
@pytest.mark.parametrize("rows", [3, 65])
def test_only_few_rows_on_a_gpu_are_computed_together(
    monkeypatch: pytest.MonkeyPatch, backend: str, rows: int
) -> None:
    x = jax.random.normal(jax.random.key(0), (rows, 256)).astype(jnp.bfloat16)
    params = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16), _Together().init(jax.random.key(1), x)
    )
    calls: list[int] = []
    products = few_rows.products
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(
        few_rows,
        "products",
        lambda x, kernels: (calls.append(len(kernels)), products(x, kernels))[1],
    )
    found = _Together().apply(params, x)
    assert calls == ([2] if backend == "gpu" and rows == 3 else [])
    for y, name in zip(found, ("first", "second"), strict=True):
        np.testing.assert_array_equal(y, x @ params["params"][name]["kernel"])
