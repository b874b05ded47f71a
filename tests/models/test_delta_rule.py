"""The gated delta rule: chunks give the numbers of the recurrence, of torch and of its formula."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.models.delta_rule import CHUNK, Steps, chunked, delta_rule, recurrent
from tests.representatives import case

BATCH, HEADS, DK, DV = 2, 3, 8, 12
Array = np.ndarray[Any, Any]


def make_steps(length: int, decay: float = 0.3) -> Steps:
    """Make positions with queries and keys of length 1."""
    rng = np.random.default_rng(length)
    q, k, v = (
        rng.standard_normal((BATCH, length, HEADS, d)).astype(np.float32) for d in (DK, DK, DV)
    )
    g, beta = (rng.uniform(0, 1, (BATCH, length, HEADS)).astype(np.float32) for _ in range(2))
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    return Steps(*map(jnp.asarray, (q, k, v, -decay * g, beta)))


def zeros() -> jax.Array:
    return jnp.zeros((BATCH, HEADS, DK, DV))


def by_formula(steps: Steps, state: Any, runs: Any = None) -> tuple[Array, Array]:
    """Return outputs and state in float64, position by position."""
    q, k, v, g, beta = (
        np.asarray(x, np.float64) for x in (steps.q, steps.k, steps.v, steps.g, steps.beta)
    )
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    for b, t, h in np.ndindex(*v.shape[:3]):
        if runs is not None and t and runs[b][t] != runs[b][t - 1]:
            state[b, h] = 0
        s = np.exp(g[b, t, h]) * state[b, h]
        change = beta[b, t, h] * (v[b, t, h] - k[b, t, h] @ s)
        state[b, h] = s + np.outer(k[b, t, h], change)
        out[b, t, h] = q[b, t, h] @ state[b, h]
    return out, state


def torch_rule(steps: Steps) -> tuple[Any, Any, list[Any]]:
    """Return outputs and state of transformers, and the arguments, of which it has the graph."""
    import torch
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    leaves = (steps.q, steps.k, steps.v, steps.g, steps.beta)
    given = [torch.tensor(np.asarray(x)).requires_grad_() for x in leaves]
    out, state = torch_chunk_gated_delta_rule(*given, output_final_state=True)
    return out * DK**0.5, state, given  # transformers scales queries


@pytest.mark.parametrize("length", [1, 5, CHUNK, 2 * CHUNK + 2])
@pytest.mark.representatives("130")
def test_outputs_state_and_gradients_are_those_of_torch(length: int) -> None:
    steps = make_steps(length)
    out, state, given = torch_rule(steps)
    (out.square().mean() + state.square().mean()).backward()

    def loss(steps: Steps) -> Any:
        own, last = delta_rule(steps, zeros(), None)
        return jnp.mean(jnp.square(own)) + jnp.mean(jnp.square(last)), (own, last)

    gradients, (own, last) = jax.jit(jax.grad(loss, has_aux=True))(steps)
    np.testing.assert_allclose(own, out.detach().numpy(), atol=2e-6)
    np.testing.assert_allclose(last, state.detach().numpy(), atol=2e-6)
    for mine, leaf in zip(jax.tree.leaves(gradients), given, strict=True):
        np.testing.assert_allclose(mine, leaf.grad.numpy(), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize("size", [16, case("1", 1, quick=False), case("64", CHUNK, quick=False)])
def test_a_state_starts_anew_with_each_run_and_padding_leaves_it_alone(size: int) -> None:
    length = 75
    steps = make_steps(length)
    runs = np.asarray([[0] * 20 + [1] * 5 + [2] * 50, [0] * 32 + [1] * 43], np.int32)
    real = np.ones((BATCH, length, 1), np.float32)
    real[0, 60:] = real[1, 10:14] = 0
    steps = Steps(steps.q, steps.k, steps.v, steps.g * real, steps.beta * real)
    start = np.random.default_rng(0).standard_normal(zeros().shape)
    out, state = jax.jit(partial(chunked, most=size))(steps, jnp.asarray(start, jnp.float32), runs)
    wanted, last = by_formula(steps, start, runs)
    np.testing.assert_allclose(out, wanted, atol=5e-6)
    np.testing.assert_allclose(state, last, atol=5e-6)


@pytest.mark.slow
def test_one_position_after_a_row_is_that_of_the_longer_row() -> None:
    steps = make_steps(CHUNK + 9)
    first, last = (
        jax.tree.map(lambda x, p=p: x[:, p], steps) for p in (slice(-1), slice(-1, None))
    )
    _, state = jax.jit(delta_rule)(first, zeros(), None)
    out, state = jax.jit(recurrent)(last, state)
    wanted, final = by_formula(steps, zeros())
    np.testing.assert_allclose(out, wanted[:, -1:], atol=5e-6)
    np.testing.assert_allclose(state, final, atol=5e-6)


def test_equal_keys_that_replace_each_other_stay_exact() -> None:
    """The powers of their system grow beyond float32, its inverse does not."""
    steps = make_steps(CHUNK, decay=0.0)
    keys = jnp.broadcast_to(steps.k[:, :1], steps.k.shape)
    steps = Steps(steps.q, keys, steps.v, steps.g, jnp.ones_like(steps.beta))
    out, _ = jax.jit(delta_rule)(steps, zeros(), None)
    np.testing.assert_allclose(out, by_formula(steps, zeros())[0], atol=5e-6)


def test_a_state_that_is_forgotten_at_once_has_finite_gradients() -> None:
    steps = make_steps(CHUNK, decay=900.0)
    gradients = jax.jit(jax.grad(lambda steps: jnp.sum(delta_rule(steps, zeros(), None)[0])))(steps)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(gradients))
