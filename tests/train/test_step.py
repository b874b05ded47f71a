"""The step: what it differentiates, what it holds, and that parts of a batch add up to the
batch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import models
from jaxpeft.models.base import ModelOptions
from jaxpeft.remat import REMAT_POLICIES
from jaxpeft.train.losses import causal_lm
from jaxpeft.train.step import TrainState, init_state, make_loss_sum, make_train_step
from tests.models.conftest import tiny_config

ROWS, LENGTH = 8, 12
WIDE = {"hidden_size": 64, "intermediate_size": 160}


@functools.cache
def started(scan_layers: bool) -> Any:
    """Return the params of the base."""
    options = ModelOptions("causal_lm", None, jnp.float32, scan_layers=scan_layers)
    model = models.build(tiny_config("llama", **WIDE), options)
    return model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"]


def setup(method: Any, dtype: Any = jnp.float32, **options: Any) -> tuple[Any, Any, Any]:
    """Return the model, the trainable and the frozen part, with a LoRA B that is not zero."""
    given = ModelOptions("causal_lm", None, dtype, **options)
    model = models.build(tiny_config("llama", **WIDE), given)
    base = jax.tree.map(lambda x: x.astype(dtype), started(options.get("scan_layers", False)))
    params = jaxpeft.rewrite(method, base, jax.random.key(1))
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    return model, jax.tree.map(lambda x: x + 0.01, trainable), frozen


def batch(parts: int = 1) -> dict[str, np.ndarray[Any, Any]]:
    """Make rows of very different numbers of tokens."""
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 90, (ROWS, LENGTH)).astype(np.int32)
    mask = (np.arange(LENGTH) < np.asarray([12, 12, 2, 3, 12, 2, 2, 7])[:, None]).astype(np.int32)
    labels = np.where(mask == 1, ids, -100).astype(np.int32)
    rows = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
        "weights": np.ones(ROWS, np.float32),
    }
    if parts == 1:
        return rows
    return {
        name: array.reshape(parts, ROWS // parts, *array.shape[1:]) for name, array in rows.items()
    }


def one_step(model: Any, trainable: Any, frozen: Any, parts: int = 1) -> tuple[TrainState, Any]:
    optimizer = optax.sgd(0.1)
    step = jax.jit(make_train_step(model, causal_lm, optimizer, parts))
    return step(init_state(trainable, optimizer, 0), frozen, batch(parts))


def largest_gap(a: Any, b: Any) -> float:
    gaps = jax.tree.map(
        lambda x, y: float(jnp.abs(x.astype(jnp.float32) - y.astype(jnp.float32)).max()), a, b
    )
    return max(jax.tree.leaves(gaps))


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.representatives("2")
def test_parts_of_a_batch_are_the_batch_whatever_the_tokens_in_each(parts: int) -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4))
    whole, metrics = one_step(model, trainable, frozen)
    split, split_metrics = one_step(model, trainable, frozen, parts)
    assert abs(float(metrics["loss"] - split_metrics["loss"])) < 1e-6
    assert largest_gap(whole.trainable, split.trainable) < 1e-6
    assert largest_gap(whole.trainable, trainable) > 1e-4  # it did move


def compiled(method: Any) -> tuple[Any, Any, Any]:
    model, trainable, frozen = setup(method)
    optimizer = optax.adamw(1e-3)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, 0), trainable)
    step = jax.jit(make_train_step(model, causal_lm, optimizer, 1), donate_argnums=0)
    return step.lower(state, frozen, batch()).compile(), trainable, frozen


def matmul_flops(program: Any) -> float:
    return program.cost_analysis()["flops"]


def test_the_compiled_program_computes_no_gradient_of_a_base_weight() -> None:
    lora, trainable, frozen = compiled(jaxpeft.LoRA(rank=4))
    full, whole, _ = compiled(jaxpeft.Full())
    # A gradient of gate_proj would be a product [tokens, in]^T [tokens, out] of this shape or its
    # transpose.
    shape = re.compile(r"= f32\[(64,160|160,64)\]\S* (dot|fusion|custom-call)\(")
    dots = re.compile(
        r"= f32\[(64,160|160,64)\]\S* (dot|custom-call)\(|ROOT \S+ = f32\[(64,160|160,64)\]\S* dot"
    )
    assert shape.search(full.as_text())  # the search finds it where it is
    assert not dots.search(lora.as_text())

    tokens = ROWS * LENGTH
    # less the embedding, a look-up
    matrices = sum(x.size for x in jax.tree.leaves(frozen) if x.ndim == 2) - 99 * 64
    adapters = sum(x.size for x in jax.tree.leaves(trainable))
    work = matmul_flops(lora) / tokens
    assert (
        work < 4.7 * matrices + 6 * adapters
    )  # 4 a frozen parameter and token, and attention and norms on top
    assert matmul_flops(full) / tokens > 5.9 * (matrices)
    assert sum(x.size for x in jax.tree.leaves(whole)) == matrices + 99 * 64 + 5 * 64


def test_only_trainable_leaves_and_optimizer_state_come_out_and_none_is_as_large_as_the_base() -> (
    None
):
    program, trainable, frozen = compiled(jaxpeft.LoRA(rank=4))
    state, _ = program.out_tree.unflatten(range(program.out_tree.num_leaves))
    held = init_state(trainable, optax.adamw(1e-3), 0)
    assert jax.tree.structure(state) == jax.tree.structure(held)
    arrays = sum(leaf.size for leaf in jax.tree.leaves(held.optimizer) if leaf.ndim)
    assert arrays == 2 * sum(leaf.size for leaf in jax.tree.leaves(trainable))
    paths = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(held.optimizer)
    }
    assert not any("kernel" in path or "embedding" in path for path in paths)
    assert len(jax.tree.leaves(frozen)) > 10


def test_frozen_leaves_are_bit_unchanged_and_only_adapters_move() -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4))
    before = jax.tree.map(np.array, frozen)
    optimizer = optax.adamw(1e-2)
    step = jax.jit(make_train_step(model, causal_lm, optimizer, 1))
    state = init_state(trainable, optimizer, 0)
    for _ in range(5):
        state, _ = step(state, frozen, batch())
    jax.tree.map(np.testing.assert_array_equal, frozen, before)
    assert int(state.step) == 5
    moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), state.trainable, trainable)
    assert min(jax.tree.leaves(moved)) > 0


def test_the_second_step_compiles_nothing() -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4))
    optimizer = optax.adamw(1e-2)
    step: Any = jax.jit(make_train_step(model, causal_lm, optimizer, 1), donate_argnums=0)
    state, _ = step(init_state(trainable, optimizer, 0), frozen, batch())
    for _ in range(3):
        state, _ = step(state, frozen, batch())
    assert step._cache_size() == 1


def gradients(**options: Any) -> Any:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4), **options)
    grad = jax.jit(jax.grad(make_loss_sum(model, causal_lm), has_aux=True))
    return grad(trainable, frozen, batch(), None)[0]


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_remat_policy_gives_the_same_gradients(scan: bool) -> None:
    plain = gradients(scan_layers=scan)
    for policy in list(REMAT_POLICIES)[1:]:
        assert largest_gap(gradients(scan_layers=scan, remat=policy), plain) < 2e-5, policy


def test_full_remat_computes_the_forward_pass_again() -> None:
    def flops(remat: str) -> float:
        model, trainable, frozen = setup(jaxpeft.LoRA(rank=4), remat=remat)
        grad = jax.jit(jax.grad(make_loss_sum(model, causal_lm), has_aux=True))
        return matmul_flops(grad.lower(trainable, frozen, batch(), None).compile())

    assert flops("full") > 1.15 * flops("none")


@pytest.mark.slow
def test_bfloat16_compute_trains_float32_adapters() -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4), dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    state, metrics = one_step(model, trainable, frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.trainable)} == {jnp.dtype("float32")}
    exact = one_step(*setup(jaxpeft.LoRA(rank=4)))[1]["loss"]
    np.testing.assert_allclose(metrics["loss"], exact, rtol=2e-2)


@pytest.mark.slow
def test_dropout_follows_the_seed_and_the_step() -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4, dropout=0.5))
    optimizer = optax.sgd(0.0)
    step = jax.jit(make_train_step(model, causal_lm, optimizer, 1))

    def losses(seed: int) -> list[float]:
        state, found = init_state(trainable, optimizer, seed), list[float]()
        for _ in range(2):
            state, metrics = step(state, frozen, batch())
            found.append(float(metrics["loss"]))
        return found

    first, second = losses(1)
    assert [first, second] == losses(1)
    assert first != second
    assert first != losses(2)[0]


@pytest.mark.parametrize("where", ["loss", "one leaf"])
@pytest.mark.representatives("one leaf")
def test_a_step_that_is_not_finite_changes_nothing_but_its_number(where: str) -> None:
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4))
    optimizer = optax.adamw(0.1)

    def loss(outputs: Any, rows: Any) -> tuple[jax.Array, jax.Array]:
        total, weight = causal_lm(outputs, rows)
        return (total * jnp.nan if where == "loss" else total), weight

    if where == "one leaf":
        # an infinite gradient of one B: its A times the output's gradient overflows
        trainable["model"]["layers"]["0"]["self_attn"]["q_proj"]["lora_a"] = jnp.full((64, 4), 3e38)
    step = jax.jit(make_train_step(model, loss, optimizer, 1))
    state = init_state(trainable, optimizer, 0)
    after, metrics = step(state, frozen, batch())
    assert int(after.step) == 1
    for part in ("trainable", "optimizer", "rng"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(state, part))
    assert metrics["broken"].any()


@pytest.mark.slow
def test_bfloat16_gradients_are_near_those_of_float32() -> None:
    """Of all leaves together; of wider models it is below a hundredth:
    `python -m benchmarks.gradients`.
    """
    model, trainable, frozen = setup(jaxpeft.LoRA(rank=4), jnp.bfloat16)
    wide = model.clone(options=dataclasses.replace(model.options, dtype=jnp.dtype(jnp.float32)))
    found, exact = (
        jax.jit(jax.grad(make_loss_sum(each, causal_lm), has_aux=True))(
            trainable, frozen, batch(), None
        )[0]
        for each in (model, wide)
    )
    gap = jax.tree.map(jnp.subtract, found, exact)
    assert optax.tree.norm(gap) < 2e-2 * optax.tree.norm(exact)
