"""The loss through the head in chunks, against the loss of all logits, and against torch's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.train.head_loss import IGNORE, CrossEntropy, through_head

RNG = np.random.default_rng(0)
KINDS = {
    "plain": CrossEntropy(),
    "smoothed": CrossEntropy(smoothing=0.1),
    "z": CrossEntropy(z_loss=1e-2),
    "capped": CrossEntropy(softcap=3.0),
    "all": CrossEntropy(0.2, 1e-3, 5.0),
}
every_kind = pytest.mark.parametrize("entropy", KINDS.values(), ids=KINDS)


def made(
    batch: int = 3, length: int = 10, width: int = 8, vocab: int = 37
) -> tuple[Any, Any, Any, Any]:
    x, kernel = RNG.normal(size=(batch, length, width)), RNG.normal(size=(width, vocab))
    labels = RNG.integers(0, vocab, (batch, length))
    labels[RNG.random(labels.shape) < 0.3] = IGNORE
    weights = np.asarray([1.0, 0.0, 0.5])[:batch, None]
    return tuple(
        map(
            jnp.asarray,
            (x.astype(np.float32), kernel.astype(np.float32), labels.astype(np.int32), weights),
        )
    )  # pyright: ignore[reportReturnType]


@every_kind
@pytest.mark.parametrize(
    "most", [1, 3 * 37 * 3, 10**6], ids=["one position", "uneven chunks", "all at once"]
)
@pytest.mark.representatives("uneven chunks-capped", "uneven chunks-smoothed")
def test_chunks_give_the_loss_and_the_gradients_of_all_logits(
    entropy: CrossEntropy, most: int
) -> None:
    x, kernel, labels, weights = made()

    def chunked(x: Any, kernel: Any) -> Any:
        total, count = through_head(
            entropy, lambda rows, i: rows @ kernel, x, labels, weights, most
        )
        return 2.5 * total, count

    def whole(x: Any, kernel: Any) -> Any:
        total, count = entropy.sums(x @ kernel, labels, weights)
        return 2.5 * total, count

    (a, n), own = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(x, kernel)
    (b, m), exact = jax.value_and_grad(whole, (0, 1), has_aux=True)(x, kernel)
    np.testing.assert_allclose(a, b, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(chunked)(x, kernel)[0], b, rtol=1e-5)
    assert float(n) == float(m) > 0
    for found, right in zip(own, exact, strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
def test_it_is_torchs_cross_entropy(smoothing: float) -> None:
    import torch

    x, kernel, labels, _ = made()
    total, count = through_head(
        CrossEntropy(smoothing),
        lambda rows, i: rows @ kernel,
        x,
        labels,
        jnp.ones((3, 1)),
        most_logits=100,
    )
    logits = torch.tensor(np.asarray(x @ kernel)).reshape(-1, 37)
    wanted = torch.tensor(np.asarray(labels), dtype=torch.long).reshape(-1)
    theirs = torch.nn.functional.cross_entropy(
        logits, wanted, ignore_index=IGNORE, label_smoothing=smoothing, reduction="sum"
    )
    np.testing.assert_allclose(total, float(theirs), rtol=1e-5)
    assert float(count) == int((labels != IGNORE).sum())


def test_the_z_loss_is_the_squared_log_of_the_normalizer() -> None:
    z = jnp.asarray(RNG.normal(size=(4, 9)), jnp.float32)
    labels = jnp.zeros((4,), jnp.int32)
    added = CrossEntropy(z_loss=0.5).losses(z, labels) - CrossEntropy().losses(z, labels)
    np.testing.assert_allclose(added, 0.5 * np.log(np.exp(np.asarray(z)).sum(-1)) ** 2, rtol=1e-4)


def test_the_logits_of_all_positions_never_exist() -> None:
    x, kernel, labels, weights = made(2, 64, 8, 50)
    most = 2 * 4 * 50

    def loss(x: Any) -> Any:
        return through_head(
            CrossEntropy(), lambda rows, i: rows @ kernel, x, labels, weights[:2], most
        )[0]

    sizes: list[int] = []

    def walk(jaxpr: Any) -> None:
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars if 50 in v.aval.shape)
            for value in equation.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(jax.grad(loss))(x).jaxpr)
    assert most == max(sizes)


def test_without_any_label_it_is_zero_and_so_is_its_gradient() -> None:
    x, kernel, labels, weights = made()
    nothing = jnp.full_like(labels, IGNORE)

    def loss(x: Any) -> Any:
        return through_head(CrossEntropy(), lambda rows, i: rows @ kernel, x, nothing, weights, 50)

    (total, count), dx = jax.value_and_grad(loss, has_aux=True)(x)
    assert float(total) == float(count) == 0 and not np.asarray(dx).any()


@pytest.mark.slow
def test_each_chunk_is_told_its_number() -> None:
    x, kernel, labels, weights = made(3, 10)
    seen = through_head(
        CrossEntropy(),
        lambda rows, i: rows @ kernel * i.astype(jnp.float32),
        x,
        labels,
        weights,
        3 * 37 * 5,
    )[0]
    half = CrossEntropy().sums(x[:, 5:] @ kernel, labels[:, 5:], weights)[0]
    flat = CrossEntropy().sums(jnp.zeros((3, 5, 37)), labels[:, :5], weights)[0]
    np.testing.assert_allclose(seen, half + flat, rtol=1e-5)
