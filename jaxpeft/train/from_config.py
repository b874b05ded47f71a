"""Build the model request, loss and abstract tree from a config, for runs and plans."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.schema import Config
from jaxpeft.core.method import Method
from jaxpeft.errors import TargetError
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.quant.quantize import Quant
from jaxpeft.train.head_loss import CrossEntropy
from jaxpeft.train.losses import Loss, loss_for
from jaxpeft.transforms.rewrite import rewrite


def model_request(
    config: ModelConfig, num_labels: int | None, *, scan_layers: bool, attention: str
) -> ModelRequest:
    """Return the model request of a run.

    Args:
        config: model config.
        num_labels: number of labels of a classification head; None to use the model's
            `config.json`.
        scan_layers: whether layers are stacked.
        attention: attention kernel.
    """
    quant = None
    if config.quant != "none":
        quant = Quant(config.quant, config.quant_targets, config.quant_exclude, config.quant_group)
    return ModelRequest(
        config.task,
        num_labels,
        _dtype(config.dtype),
        _dtype(config.compute_dtype),
        scan_layers,
        config.pooling,
        "none" if config.remat == "auto" else config.remat,
        attention,
        config.vocab_size,
        quant,
        right_padded=True,
    )


def _dtype(name: str) -> Any:
    return None if name == "auto" else jnp.dtype(name)


def training_loss(config: Config, problem: str | None) -> Loss:
    """Return the training loss of a run.

    Args:
        config: config of the run.
        problem: `single_label`, `multi_label` or `regression` for sequence classification.
    """
    return loss_for(
        config.model.task, problem, CrossEntropy(config.train.label_smoothing, config.train.z_loss)
    )


def abstract_rewrite(method: Method, base: Mapping[str, Any]) -> Any:
    """Return the shape and dtype of every leaf of the rewritten tree.

    Args:
        method: method that injects adapters.
        base: base parameters; leaves may be abstract.

    Raises:
        TargetError: the method's targets match no module of the model.
    """
    try:
        return jax.eval_shape(
            partial(rewrite, method), base, jax.eval_shape(lambda: jax.random.key(0))
        )
    except TargetError as error:
        raise TargetError([f"config.method.{problem}" for problem in error.problems]) from error
