"""Schedules by their values, updates against torch's, and what the optimizer holds and leaves
alone.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.schema import Config
from jaxpeft.config.train_config import OptimizerConfig
from jaxpeft.core.method import Method
from jaxpeft.errors import ConfigError
from jaxpeft.train import optimizers

TREE = {
    "bert": {
        "dense": {"lora_a": jnp.ones((3, 2)), "bias": jnp.ones(3)},
        "norm": {"scale": jnp.ones(3)},
    },
    "classifier": {"kernel": jnp.ones((3, 2))},
}


def rates(steps: int, at: list[int], **options: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **options)
    schedule = optimizers.schedule(config, config.learning_rate, steps)
    return [float(np.asarray(schedule(step))) for step in at]


def updated(options: dict[str, Any], tree: Any = TREE, grads: Any = None, steps: int = 1) -> Any:
    optimizer = optimizers.build(OptimizerConfig(schedule="constant", **options), 100)
    with jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(tree)
        for _ in range(steps):
            given = jax.tree.map(jnp.ones_like, tree) if grads is None else grads
            changes, state = optimizer.update(given, state, tree)
            tree = optax.apply_updates(tree, changes)
    return tree


def test_linear_decays_to_the_final_ratio() -> None:
    assert rates(100, [0, 50, 100], schedule="linear") == pytest.approx([1.0, 0.5, 0.0])
    assert rates(100, [100], schedule="linear", final_ratio=0.1) == pytest.approx([0.1])


def test_cosine_is_half_way_in_the_middle() -> None:
    assert rates(100, [0, 50, 100], schedule="cosine", final_ratio=0.2) == pytest.approx(
        [1.0, 0.6, 0.2]
    )


def test_constant_stays() -> None:
    assert rates(100, [0, 37, 99], schedule="constant") == [1.0, 1.0, 1.0]


def test_wsd_warms_up_holds_and_decays() -> None:
    options = {"schedule": "wsd", "warmup_steps": 10, "decay_ratio": 0.2}
    assert rates(100, [10, 50, 79, 80, 90, 100], **options) == pytest.approx([1, 1, 1, 1, 0.5, 0])


def test_warm_up_rises_from_above_zero_to_the_peak() -> None:
    found = rates(100, [0, 1, 2, 3, 4], schedule="constant", warmup_steps=4)
    assert found == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(100, [0, 4], warmup_ratio=0.04, schedule="constant") == pytest.approx([0.2, 1.0])


def test_a_warm_up_as_long_as_the_run_is_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"optimizer.warmup_steps: 10 warm-up steps must be fewer than the run's 10",
    ):
        rates(10, [0], warmup_steps=10)


def test_adamw_is_torchs() -> None:
    import torch

    rng = np.random.default_rng(0)
    start, grads = (
        rng.normal(size=(4, 3)).astype(np.float32),
        rng.normal(size=(4, 3)).astype(np.float32),
    )
    theirs = torch.nn.Parameter(torch.tensor(start))
    optimizer = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.05)
    for _ in range(5):
        theirs.grad = torch.tensor(grads)
        optimizer.step()
    options = {"learning_rate": 0.1, "weight_decay": 0.05, "clip_norm": None}
    ours = updated(options, {"kernel": jnp.asarray(start)}, {"kernel": jnp.asarray(grads)}, 5)
    np.testing.assert_allclose(ours["kernel"], theirs.detach().numpy(), atol=1e-5)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.representatives("adafactor", "lion", "sgd")
def test_every_optimizer_goes_down_a_slope(name: str) -> None:
    optimizer = optimizers.build(
        OptimizerConfig(name=name, learning_rate=0.02, schedule="constant"), 100
    )  # type: ignore[arg-type]
    tree = {"kernel": jnp.asarray([[2.0, -3.0], [1.0, 0.5]])}

    def loss(tree: Any) -> jax.Array:
        return jnp.sum(jnp.square(tree["kernel"]))

    before, state = float(loss(tree)), optimizer.init(tree)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(20):
            changes, state = optimizer.update(jax.grad(loss)(tree), state, tree)
            tree: Any = optax.apply_updates(tree, changes)
    assert float(loss(tree)) < 0.9 * before


def test_clipping_is_by_the_norm_of_everything_trained() -> None:
    tree = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"bias": jnp.zeros(12)}}
    # sixteen ones: norm 4
    after = updated({"name": "sgd", "learning_rate": 1.0, "clip_norm": 1.0}, tree)
    np.testing.assert_allclose(after["a"]["kernel"], -0.25, rtol=1e-6)
    np.testing.assert_allclose(after["b"]["bias"], -0.25, rtol=1e-6)


def test_the_head_has_its_own_learning_rate() -> None:
    after = updated(
        {"name": "sgd", "learning_rate": 0.1, "head_learning_rate": 0.5, "clip_norm": None}
    )
    np.testing.assert_allclose(after["bert"]["dense"]["lora_a"], 0.9, rtol=1e-6)
    np.testing.assert_allclose(after["classifier"]["kernel"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.parametrize("head", [None, 0.1])
@pytest.mark.representatives("0.1-*", "None-lion", "None-sgd")
def test_weight_decay_leaves_biases_and_norms_alone(name: str, head: float | None) -> None:
    options = {
        "name": name,
        "learning_rate": 0.1,
        "head_learning_rate": head,
        "weight_decay": 0.5,
        "clip_norm": None,
    }
    after = updated(options, grads=jax.tree.map(jnp.zeros_like, TREE))
    assert float(after["bert"]["dense"]["lora_a"][0, 0]) < 1
    assert float(after["classifier"]["kernel"][0, 0]) < 1
    np.testing.assert_array_equal(after["bert"]["dense"]["bias"], 1)
    np.testing.assert_array_equal(after["bert"]["norm"]["scale"], 1)


def test_adam_holds_two_moments_of_what_is_trained_and_nothing_else() -> None:
    state = optimizers.build(OptimizerConfig(), 10).init(TREE)
    held = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert held == 2 * sum(leaf.size for leaf in jax.tree.leaves(TREE))


def test_the_head_alone_gets_the_heads_rate() -> None:
    config = optimizers.head_only_options(
        OptimizerConfig(learning_rate=0.1, head_learning_rate=0.5)
    )
    assert (config.learning_rate, config.head_learning_rate) == (0.5, None)


def test_any_method_that_trains_the_head_alone_gets_its_rate() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Probe(Method):
        name: ClassVar[str] = "probe"

    given = Config(
        method=Probe(), optimizer=OptimizerConfig(learning_rate=0.1, head_learning_rate=0.5)
    )
    assert optimizers.options_for(given) == OptimizerConfig(learning_rate=0.5)
    assert (
        optimizers.options_for(dataclasses.replace(given, method=jaxpeft.BitFit()))
        == given.optimizer
    )
    found = Config(method=Probe(), model=ModelConfig(path="somewhere")).problems()
    assert (
        "method.name: 'probe' trains only a classification head, but the task is"
        " 'causal_lm'; use another method" in found
    )


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd"])
@pytest.mark.representatives("lion", "sgd")
def test_weight_decay_follows_the_learning_rate_of_each_part(name: str) -> None:
    """Without a gradient a kernel shrinks by `rate * decay` a step, whatever the optimizer."""
    options = OptimizerConfig(
        name=name,
        learning_rate=1e-3,
        head_learning_rate=1e-2,
        weight_decay=0.1,
        schedule="constant",  # type: ignore[arg-type]
    )
    optimizer = optimizers.build(options, 100)
    params = {
        "bert": {"query": {"kernel": jnp.ones((4, 4))}},
        "classifier": {"kernel": jnp.ones((4, 2))},
    }
    state = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(10):
            updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)
            params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["bert"]["query"]["kernel"], (1 - 1e-4) ** 10, rtol=1e-5)
    np.testing.assert_allclose(params["classifier"]["kernel"], (1 - 1e-3) ** 10, rtol=1e-5)
