"""Losses as a sum and a weight, so that micro-batches add up to exactly the loss of the batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
import optax

from jaxpeft.errors import ConfigError
from jaxpeft.train.head_loss import IGNORE, CrossEntropy, through_head
from jaxpeft.train.outputs import Batch, Outputs

Loss = Callable[[Outputs, Batch], tuple[jax.Array, jax.Array]]


def causal_lm(
    outputs: Outputs, batch: Batch, entropy: CrossEntropy = CrossEntropy()
) -> tuple[jax.Array, jax.Array]:
    """Return the next-token loss: position t predicts the label at t + 1.

    Args:
        outputs: hidden states and head; the full logits are never computed.
        batch: `labels [batch, length]`, -100 outside the loss mask, and `weights [batch]`.
        entropy: cross-entropy to compute.

    Returns:
        `(sum over tokens, number of tokens)`.
    """
    labels = batch["labels"]
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    return through_head(entropy, outputs.head, outputs.hidden, following, batch["weights"][:, None])


def tokens(
    outputs: Outputs, batch: Batch, entropy: CrossEntropy = CrossEntropy()
) -> tuple[jax.Array, jax.Array]:
    """Return the token classification loss.

    `logits [batch, length, classes]`, `labels [batch, length]`.

    Returns:
        `(sum over tokens, number of tokens)`.
    """
    return entropy.sums(outputs.logits, batch["labels"], batch["weights"][:, None])


def single_label(
    outputs: Outputs, batch: Batch, entropy: CrossEntropy = CrossEntropy()
) -> tuple[jax.Array, jax.Array]:
    """Return the single-label classification loss.

    `logits [batch, classes]`, `labels [batch]` int32.

    Returns:
        `(sum over rows, number of rows)`.
    """
    return entropy.sums(outputs.logits, batch["labels"], batch["weights"])


def multi_label(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the multi-label loss, a binary cross-entropy per class.

    `labels [batch, classes]` float32.

    Returns:
        `(sum over rows, number of rows)`.
    """
    losses = optax.sigmoid_binary_cross_entropy(outputs.logits.astype(jnp.float32), batch["labels"])
    return jnp.sum(losses.mean(-1) * batch["weights"]), jnp.sum(batch["weights"])


def regression(outputs: Outputs, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Return the mean squared error: `logits [batch, 1]`, `labels [batch]` float32.

    Returns:
        `(sum over rows, number of rows)`.
    """
    error = outputs.logits[:, 0].astype(jnp.float32) - batch["labels"]
    return jnp.sum(jnp.square(error) * batch["weights"]), jnp.sum(batch["weights"])


_ENTROPIES: Mapping[str | None, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "causal_lm": causal_lm,
    "token_classification": tokens,
    "single_label": single_label,
}
_OTHERS: Mapping[str | None, Loss] = {"multi_label": multi_label, "regression": regression}


def loss_for(task: str, problem: str | None, entropy: CrossEntropy = CrossEntropy()) -> Loss:
    """Return the loss of a task.

    Args:
        task: task of the model.
        problem: `single_label`, `multi_label` or `regression` for sequence classification.
        entropy: cross-entropy to use, if the loss is one.

    Raises:
        ConfigError: no loss is defined for the task.
    """
    kind = problem if task == "sequence_classification" else task
    if kind in _ENTROPIES:
        return partial(_ENTROPIES[kind], entropy=entropy)
    if kind in _OTHERS:
        return _OTHERS[kind]
    raise ConfigError(f"no loss is defined for task {task!r} with problem {problem!r}")
