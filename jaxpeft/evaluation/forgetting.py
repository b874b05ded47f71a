r"""Forgetting: the loss of an ability of the base through adaptation.

    forgetting = a(base) - a(adapted)

for an ability `a` that is not trained, measured on another dataset. It is negative if training
improves the ability.

For an encoder or a classifier, `a` is the leave-one-out accuracy of a nearest-centroid classifier.
With the hidden states `h [T, d]` of sentence i, without the head:

    e_i = mean of h over the tokens, divided by its norm
    c_k = sum of e_j over the sentences j of class k, j != i, divided by its norm
    a   = share of the sentences whose class is the k with the largest e_i c_k

Sentences that are alone in their class are not counted.

For a language model, `a` is minus the mean token loss on other texts, in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import forward, models
from jaxpeft.errors import DataError
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.logical_axes import mesh_under, on_mesh

_INPUTS = ("token_type_ids", "position_ids", "segment_ids")
_MIN_NORM = 1e-12
"""Lower bound of norms, to avoid division by zero."""


@dataclass(frozen=True)
class Forgetting:
    """An ability of a backbone, before and after adaptation.

    Attributes:
        measure: `centroid_accuracy` or `loss`.
        before: value of the base.
        after: value of the adapted backbone.
    """

    measure: str
    before: float
    after: float

    @property
    def lost(self) -> float:
        """The decrease of the ability."""
        return self.after - self.before if self.measure == "loss" else self.before - self.after


def backbone_of(model: Pretrained, params: Mapping[str, Any]) -> tuple[Pretrained, dict[str, Any]]:
    """Return a model without its head.

    Args:
        model: a model from `jaxpeft.load`, for any task.
        params: its parameters, rewritten or not; adapter leaves keep their paths.

    Returns:
        `(model, params)` that compute hidden states `[batch, length, d]`.
    """
    config = read_model_config(model.source.folder)
    options = dataclasses.replace(
        model.options, task="encoder", num_labels=None, pooling=None, remat="none"
    )
    root = {key: leaf for key, leaf in params.items() if not isinstance(leaf, Mapping)}
    return models.build(config, options), {
        **params[models.FAMILIES[config["model_type"]].prefix],
        **root,
    }


def embeddings(
    model: Pretrained,
    params: Mapping[str, Any],
    batches: Iterable[tuple[Mapping[str, Any], np.ndarray[Any, Any]]],
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the normalized mean hidden state of each row, computed without the head.

    Args:
        model: a model from `jaxpeft.load`, for any task.
        params: its parameters, rewritten or not.
        batches: batches from `jaxpeft.data.eval_batches`.

    Returns:
        float32 `[n, d]` with unit norms, and the labels `[n]`, in the order of the batches.
    """
    backbone, inner = backbone_of(model, params)

    def direction(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        inputs: dict[str, Any] = {name: batch[name] for name in _INPUTS if name in batch}
        hidden = forward.run(
            backbone, params, batch["input_ids"], batch["attention_mask"], **inputs
        ).astype(jnp.float32)
        token = batch["attention_mask"][..., None].astype(jnp.float32)
        total = (hidden * token).sum(1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), _MIN_NORM)

    run = jax.jit(on_mesh(mesh_under(inner), direction))
    vectors: list[np.ndarray[Any, Any]] = []
    labels: list[np.ndarray[Any, Any]] = []
    for batch, rows in batches:
        real = rows >= 0
        out = run(inner, {name: jnp.asarray(array) for name, array in batch.items()})
        vectors.append(np.asarray(out)[real])
        labels.append(batch["labels"][real])
    return np.concatenate(vectors), np.concatenate(labels)


def centroid_accuracy(rows: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Return the leave-one-out accuracy of the nearest class mean.

    Args:
        rows: `[n, d]`, with unit norms.
        labels: class ids, int `[n]`.

    Raises:
        DataError: there are fewer than two classes, or no class has two rows.
    """
    classes, class_of = np.unique(labels, return_inverse=True)
    counts = np.bincount(class_of)
    if len(classes) < 2 or counts.max() < 2:
        raise DataError(
            f"{len(labels)} rows of {len(classes)} classes: the centroid accuracy needs at least"
            " two classes, and two rows in one of them"
        )
    vectors = rows.astype(np.float64)
    sums = np.zeros((len(classes), vectors.shape[1]))
    np.add.at(sums, class_of, vectors)
    similarity = vectors @ _normalize(sums).T
    others = sums[class_of] - vectors  # the sum of each row's class without the row
    similarity[np.arange(len(rows)), class_of] = (vectors * _normalize(others)).sum(1)
    counted = counts[class_of] > 1
    return float((similarity.argmax(1) == class_of)[counted].mean())


def _normalize(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _MIN_NORM)
