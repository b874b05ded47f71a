"""Losses as a sum and a weight, so that parts of a batch add up to exactly the whole batch's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from jaxpeft.errors import ConfigError

IGNORE = -100
Batch = Mapping[str, jax.Array]
Loss = Callable[[jax.Array, Batch], tuple[jax.Array, jax.Array]]


def masked_cross_entropy(logits: jax.Array, labels: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Sums the cross-entropy of the positions that have a label.

    Args:
        logits: `[..., classes]`, floating.
        labels: `[...]` int32, -100 for no label.
        weights: broadcast to `labels`, float32.

    Returns:
        `(sum of weight * loss, sum of weight)` over labelled positions, float32 scalars; `(0, 0)` where there is none.
    """
    labelled = labels != IGNORE
    # the label is replaced before the look-up: a gather out of range gives NaN, and 0 * NaN is NaN
    safe = jnp.where(labelled, labels, 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), safe)
    counted = jnp.where(labelled, jnp.broadcast_to(weights, labels.shape), 0.0)
    return jnp.sum(jnp.where(counted > 0, losses * counted, 0.0)), jnp.sum(counted)


def causal_lm(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Next-token loss: position t predicts the label at t + 1.

    Args:
        logits: `[batch, length, vocab]`.
        batch: `labels [batch, length]`, -100 where there is no loss, and `weights [batch]`.

    Returns:
        `(sum over tokens, number of tokens)`.
    """
    return masked_cross_entropy(logits[:, :-1], batch["labels"][:, 1:], batch["weights"][:, None])


def tokens(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Token classification: `logits [batch, length, classes]`, `labels [batch, length]`; `(sum, number of tokens)`."""
    return masked_cross_entropy(logits, batch["labels"], batch["weights"][:, None])


def single_label(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """One class a row: `logits [batch, classes]`, `labels [batch]` int32; `(sum, number of rows)`."""
    return masked_cross_entropy(logits, batch["labels"], batch["weights"])


def multi_label(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Several classes a row, each its own yes or no: `labels [batch, classes]` float32 of 0 and 1; `(sum, rows)`."""
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), batch["labels"])
    return jnp.sum(losses.mean(-1) * batch["weights"]), jnp.sum(batch["weights"])


def regression(logits: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Mean squared error: `logits [batch, 1]`, `labels [batch]` float32; `(sum, rows)`."""
    error = logits[:, 0].astype(jnp.float32) - batch["labels"]
    return jnp.sum(jnp.square(error) * batch["weights"]), jnp.sum(batch["weights"])


_BY_PROBLEM: Mapping[str, Loss] = {
    "single_label": single_label,
    "multi_label": multi_label,
    "regression": regression,
}


def loss_for(task: str, problem: str | None) -> Loss:
    """Gives the loss of a task.

    Args:
        task: of the model.
        problem: `single_label`, `multi_label` or `regression` for sequence classification.

    Raises:
        ConfigError: the task has no loss.
    """
    if task == "causal_lm":
        return causal_lm
    if task == "token_classification":
        return tokens
    if task == "sequence_classification" and problem is not None and problem in _BY_PROBLEM:
        return _BY_PROBLEM[problem]
    raise ConfigError(f"task {task!r} with problem {problem!r} has no loss")
