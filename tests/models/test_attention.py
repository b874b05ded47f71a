"""What a position may see, and which kernel computes it."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft import models
from jaxpeft.models import attention
from jaxpeft.models.attention import KERNELS, AttentionKernel, fastest
from jaxpeft.models.attention_scores import Scoring, softmax
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.masks import Mask, make_mask


@pytest.mark.parametrize("window", [0, 1, 3, 9])
def test_a_causal_mask_written_out_is_its_definition(window: int) -> None:
    text = jnp.asarray([[1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1]])
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 2, 2]])
    found = np.asarray(make_mask(text, segments, causal=True, window=window).to_array(6))
    for row, query, key in np.ndindex(2, 6, 6):
        near = key <= query and (not window or query - key < window)
        same = bool(segments[row, query] == segments[row, key])
        assert found[row, 0, query, key] == (near and same and bool(text[row, key]))


def test_what_everything_may_see_needs_no_mask() -> None:
    assert make_mask(None, None, causal=False).to_array(4) is None
    assert make_mask(None, None, causal=True) == Mask(causal=True)


class Seen(nn.Module):
    """Attends with a kernel that keeps what it is given."""

    kernel: str = "cudnn"
    rate: float = 0.0

    def __call__(self, q: Any, k: Any, mask: Mask) -> Any:
        return attention.attend(self, self.kernel, q, k, k, mask, self.rate)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Mask]:
    seen: list[Mask] = []

    def compute(q: Any, k: Any, v: Any, mask: Mask, *rest: Any) -> Any:
        seen.append(mask)
        return KERNELS["xla"].compute(q, k, v, mask, *rest)

    own = KERNELS["cudnn"]
    fake = AttentionKernel(compute, own.platform, own.lacks, own.takes)
    monkeypatch.setattr(attention, "KERNELS", {**KERNELS, "cudnn": fake})
    return seen


def test_a_kernel_that_does_not_fit_gives_way(calls: list[Mask]) -> None:
    q = jnp.ones((1, 4, 2, 8), jnp.bfloat16)
    run = Seen().apply
    run({}, q, q, Mask(causal=True))
    assert len(calls) == 1
    run({}, q.astype(jnp.float32), q.astype(jnp.float32), Mask(causal=True))
    run({}, q[..., :6], q[..., :6], Mask(causal=True))
    run({}, q[:, :3], q[:, :3], Mask(jnp.ones((1, 1, 3, 3), bool), causal=True))
    Seen(rate=0.5).apply({}, q, q, Mask(causal=True), rngs={"dropout": jax.random.key(0)})
    assert len(calls) == 1
    Seen(rate=0.5).apply({}, q, q, Mask(causal=True))  # no training call
    run({}, q, q, Mask(jnp.ones((1, 1, 4, 4), bool), causal=True))
    assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("window", [0, 3])
def test_rows_padded_on_the_right_need_no_mask_and_give_the_same(
    window: int, calls: list[Mask]
) -> None:
    shape = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    kind = {
        "model_type": "mistral",
        "num_key_value_heads": 2,
        "max_position_embeddings": 8,
        "sliding_window": window or None,
    }
    options = ModelOptions("causal_lm", None, jnp.dtype(jnp.bfloat16))
    model = models.build(shape | kind, options)
    params = model.init(jax.random.key(0), jnp.ones((1, 2), jnp.int32))["params"]
    ids = jnp.asarray([[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 2, 1, 5, 6, 7, 8]])
    text = jnp.asarray([[1] * 5 + [0] * 3, [1] * 8])
    plain, bare = (
        model.clone(options=dataclasses.replace(options, attention="cudnn", right_padded=right))
        for right in (False, True)
    )
    a, b = (np.asarray(m.apply({"params": params}, ids, text)) for m in (plain, bare))
    assert calls[0].row_mask() is not None and calls[-1].row_mask() is None and calls[-1].causal
    assert {mask.window for mask in calls} == {window}
    np.testing.assert_allclose(a[text > 0], b[text > 0], atol=1e-6)


def masks(kind: str, rng: np.random.Generator, length: int = 256) -> tuple[Mask, Any]:
    """Return a mask, and which positions hold text."""
    text = jnp.arange(length)[None] < jnp.asarray([[length], [length // 2 + 2]])
    return {
        "causal": Mask(causal=True),
        "window": Mask(causal=True, window=40),
        "packed": Mask(causal=True, segments=jnp.asarray(np.sort(rng.integers(0, 4, (2, length))))),
        "padded": Mask(causal=True, text=text),
        "both ways": Mask(text=text),
    }[kind], text


def with_gradient(compute: Any, q: Any, k: Any, v: Any, mask: Mask, text: Any) -> Any:
    """Return the result of an attention where there is text, and the gradients of a function of
    it.
    """

    def loss(q: Any, k: Any, v: Any) -> Any:
        out = compute(q, k, v, mask, lambda weights: weights)
        return jnp.where(text[..., None, None], out, 0), None

    def both(q: Any, k: Any, v: Any) -> Any:
        out, back, _ = jax.vjp(loss, q, k, v, has_aux=True)
        return out, back(jnp.cos(out))

    return jax.jit(both)(q, k, v)


MASKS = ("causal", "window", "packed", "padded", "both ways")


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.representatives("padded-1")
def test_splash_attention_is_the_reference(kind: str, kv_heads: int) -> None:
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.normal(size=(2, 256, n, 64)), jnp.float32) for n in (2, kv_heads, kv_heads)
    )
    mask, text = masks(kind, rng)
    assert KERNELS["splash"].takes(q, k, mask) and not KERNELS["splash"].lacks(
        q.dtype, (64, 64), 0.0, Scoring()
    )
    found = with_gradient(partial(attention._splash, interpret=True), q, k, v, mask, text)  # pyright: ignore[reportPrivateUsage]
    right = with_gradient(KERNELS["xla"].compute, q, k, v, mask, text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, right)


@pytest.mark.slow
def test_splash_attention_takes_values_of_another_size_than_keys() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 256, 2, n)), jnp.float32) for n in (192, 192, 128))
    mask, text = masks("padded", rng)
    found = with_gradient(partial(attention._splash, interpret=True), q, k, v, mask, text)  # pyright: ignore[reportPrivateUsage]
    right = with_gradient(KERNELS["xla"].compute, q, k, v, mask, text)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), found, right)


def test_a_sink_is_a_key_without_a_value() -> None:
    rng = np.random.default_rng(0)
    logits, sinks = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=3)
    shares = np.exp(
        np.concatenate([logits, np.broadcast_to(sinks[:, None, None], (2, 3, 4, 1))], -1)
    )
    wanted = (shares / shares.sum(-1, keepdims=True))[..., :-1]
    given = jnp.asarray(logits, jnp.float32), jnp.asarray(sinks, jnp.float32)
    np.testing.assert_allclose(softmax(*given), wanted, rtol=1e-5)
    none = jnp.full((1, 3, 1, 5), jnp.finfo(jnp.float32).min)
    np.testing.assert_array_equal(softmax(none, given[1]), 0)


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_kernels_without_sinks_give_way(name: str) -> None:
    why = KERNELS[name].lacks(jnp.bfloat16, (64, 64), 0.0, Scoring(sinks=True))
    assert why == "heads have attention sinks"
    assert not KERNELS[name].lacks(jnp.bfloat16, (64, 64), 0.0, Scoring())
    assert not KERNELS["chunked"].lacks(jnp.bfloat16, (64, 64), 0.0, Scoring(sinks=True))


def test_the_fastest_kernel_of_a_platform() -> None:
    assert [fastest(name) for name in ("cuda", "tpu", "cpu", "rocm")] == [
        "cudnn",
        "splash",
        "xla",
        "xla",
    ]


def test_why_a_kernel_does_not_fit_a_model() -> None:
    shape = {
        "vocab_size": 8,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = shape | {"model_type": "llama", "max_position_embeddings": 8}

    def why(dtype: Any, **more: Any) -> str:
        options = ModelOptions("causal_lm", None, jnp.dtype(dtype), attention="cudnn")
        return attention.lacks(options, models.build(config | more, options).config)

    assert why(jnp.bfloat16) == ""
    assert why(jnp.float32) == "activations are float32, not bfloat16"
    assert why(jnp.bfloat16, attention_dropout=0.1) == "attention dropout is 0.1"
    capped = {
        "model_type": "gemma2",
        "num_key_value_heads": 1,
        "head_dim": 16,
        "attn_logit_softcapping": 30.0,
    }
    assert why(jnp.bfloat16, **capped) == "attention scores are bounded by 30"
    assert why(jnp.bfloat16, head_dim=12) == "the head size is 12, not a multiple of 8 up to 128"
    latent = {"model_type": "deepseek_v3", "qk_nope_head_dim": 32, "v_head_dim": 32}
    latent |= {"n_group": 1, "topk_group": 1}
    assert why(jnp.bfloat16, **latent) == "keys have 96 dimensions, values 32"
    splash = attention.KERNELS["splash"]
    assert splash.lacks(jnp.bfloat16, (192, 128), 0.0, Scoring()) == ""
    assert splash.lacks(jnp.bfloat16, (192, 96), 0.0, Scoring()) == (
        "the head size is 96, not a multiple of 64"
    )
