"""The optimizer and learning rate schedule, for the trainable part of the tree only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from jaxpeft.config.schema import Config
from jaxpeft.config.train_config import OptimizerConfig
from jaxpeft.core import paths, training_hooks
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.errors import ConfigError

_NOT_DECAYED = frozenset({"bias", "scale"})


def schedule(config: OptimizerConfig, peak: float, steps: int) -> optax.Schedule:
    """Make the learning rate schedule: linear warm-up, then the configured decay.

    Args:
        config: optimizer options.
        peak: learning rate after warm-up.
        steps: number of steps of the run.

    Raises:
        ConfigError: the warm-up is not shorter than the run.
    """
    ratio = config.warmup_ratio if config.warmup_ratio is not None else 0.0
    warmup = config.warmup_steps if config.warmup_steps is not None else round(ratio * steps)
    if warmup >= steps:
        raise ConfigError(
            f"optimizer.warmup_steps: {warmup} warm-up steps must be fewer than the run's {steps}"
            " steps"
        )
    remaining, end = steps - warmup, peak * config.final_ratio
    decays: dict[str, Callable[[], optax.Schedule]] = {
        "linear": lambda: optax.linear_schedule(peak, end, remaining),
        "cosine": lambda: optax.cosine_decay_schedule(peak, remaining, config.final_ratio),
        "constant": lambda: optax.constant_schedule(peak),
        "wsd": lambda: _stable_decay(
            peak, end, remaining, max(1, round(config.decay_ratio * steps))
        ),
    }
    after = decays[config.schedule]()
    if not warmup:
        return after
    # start above zero, so that the first step is not wasted
    return optax.join_schedules(
        [optax.linear_schedule(peak / (warmup + 1), peak, warmup), after], [warmup]
    )


def _stable_decay(peak: float, end: float, remaining: int, decay: int) -> optax.Schedule:
    stable = max(0, remaining - decay)
    return optax.join_schedules(
        [optax.constant_schedule(peak), optax.linear_schedule(peak, end, remaining - stable)],
        [stable],
    )


def build(
    config: OptimizerConfig, steps: int, method: Method | None = None
) -> optax.GradientTransformation:
    """Make the optimizer: global-norm clipping, then the update, with a separate head learning rate
    if set.

    It receives only the trainable part of the tree, so it has no state for frozen leaves.

    Args:
        config: optimizer options.
        steps: number of steps of the run.
        method: method to train, which may set per-leaf rates and wrap the optimizer.
    """
    update = _update(config, schedule(config, config.learning_rate, steps))
    if config.head_learning_rate is not None:
        head = _update(config, schedule(config, config.head_learning_rate, steps))
        update = optax.partition({"base": update, "head": head}, _labels)
    clip = (
        optax.clip_by_global_norm(config.clip_norm)
        if config.clip_norm is not None
        else optax.identity()
    )
    if method is None:
        return optax.chain(clip, update)
    return training_hooks.wrap_optimizer(
        method, optax.chain(clip, update, _at_rates(method)), steps
    )


def _at_rates(method: Method) -> optax.GradientTransformation:
    """Scale the updates of each leaf by the method's learning rate multiplier."""

    def scale(updates: Any, params: Any) -> Any:
        del params
        return paths.map_with_path(
            lambda path, leaf: (
                leaf if (rate := training_hooks.rate(method, path)) == 1.0 else rate * leaf
            ),
            updates,
        )

    return optax.stateless(scale)


def _labels(tree: Tree) -> Tree:
    return paths.map_with_path(lambda path, _: "head" if paths.is_head(path) else "base", tree)


def _decay_mask(tree: Tree) -> Tree:
    return paths.map_with_path(
        lambda path, leaf: path[-1] not in _NOT_DECAYED and not _is_masked(leaf), tree
    )


def _is_masked(leaf: Any) -> bool:
    return isinstance(leaf, optax.MaskedNode)


def _update(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    decay = config.weight_decay
    kinds: dict[str, Callable[[], optax.GradientTransformation]] = {
        "adamw": lambda: optax.adamw(
            rate,
            config.b1,
            config.b2,
            config.eps,
            weight_decay=decay,
            mask=_decay_mask,
            mu_dtype=jnp.float32,
        ),
        "lion": lambda: optax.lion(
            rate, config.b1, config.b2, weight_decay=decay, mask=_decay_mask
        ),
        # optax's own weight decay is applied after the learning rate and would not scale with it
        "adafactor": lambda: optax.chain(
            optax.adafactor(None, multiply_by_parameter_scale=False),
            optax.add_decayed_weights(-decay, _decay_mask),
            optax.scale_by_learning_rate(rate, flip_sign=False),
        ),
        "sgd": lambda: optax.chain(
            optax.add_decayed_weights(decay, _decay_mask), optax.sgd(rate, config.momentum or None)
        ),
    }
    return kinds[config.name]()


def options_for(config: Config) -> OptimizerConfig:
    """Return the optimizer options for the method of a config."""
    return (
        head_only_options(config.optimizer)
        if trains_head_alone(config.method)
        else config.optimizer
    )


def head_only_options(config: OptimizerConfig) -> OptimizerConfig:
    """Return the options with the head learning rate for all parameters."""
    rate = config.head_learning_rate or config.learning_rate
    return dataclasses.replace(config, learning_rate=rate, head_learning_rate=None)
