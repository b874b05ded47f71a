r"""Forgetting: what a base could do of something else, and cannot do any more with its adapter.

    forgetting = a(base) - a(adapted)

for an ability `a` that no run is trained for, measured on rows of another data set. It is negative
where training has helped.

Of an encoder, or any classifier, `a` is how well labeled sentences stand by their classes. With the
hidden states `h [T, d]` of sentence i, the head left off:

    e_i = mean of h over the tokens, over its norm
    c_k = sum of e_j over the sentences j of class k, j != i, over its norm
    a   = share of the sentences whose own class is the k of the largest e_i c_k

No sentence is in the mean that it is compared with, and one that is alone in its class is not
counted.

Of a language model, `a` is minus the mean loss of a token of other texts, in nats.
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
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.logical_axes import mesh_under, on_mesh

_INPUTS = ("token_type_ids", "position_ids", "segment_ids")
_LEAST = 1e-12
"""A norm below this is taken as this: a mean of zeros has no direction."""


@dataclass(frozen=True)
class Forgetting:
    """An ability of a backbone, before it was adapted and after.

    Attributes:
        measure: `centroid_accuracy` or `loss`.
        before: of the base.
        after: of the adapted backbone.
    """

    measure: str
    before: float
    after: float

    @property
    def lost(self) -> float:
        """How much of the ability is gone."""
        return self.after - self.before if self.measure == "loss" else self.before - self.after


def backbone_of(model: Pretrained, params: Mapping[str, Any]) -> tuple[Pretrained, dict[str, Any]]:
    """Take the head off.

    Args:
        model: what `jaxpeft.load` gave, for any task.
        params: its parameters, rewritten or not; adapter leaves stay where they are.

    Returns:
        `(model, params)` that give hidden states `[batch, length, d]`.
    """
    config = read_json(model.source.folder / "config.json")
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
    """Return the direction of the mean hidden state of each row, by the model without its head.

    Args:
        model: what `jaxpeft.load` gave, for any task.
        params: its parameters, rewritten or not.
        batches: as `jaxpeft.data.eval_batches` gives them.

    Returns:
        float32 `[n, d]`, each of norm one, and the labels `[n]`; in the order of the batches.
    """
    backbone, inner = backbone_of(model, params)

    def direction(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> jax.Array:
        inputs: dict[str, Any] = {name: batch[name] for name in _INPUTS if name in batch}
        hidden = forward.run(
            backbone, params, batch["input_ids"], batch["attention_mask"], **inputs
        ).astype(jnp.float32)
        token = batch["attention_mask"][..., None].astype(jnp.float32)
        total = (hidden * token).sum(1)
        return total / jnp.maximum(jnp.linalg.norm(total, axis=-1, keepdims=True), _LEAST)

    run = jax.jit(on_mesh(mesh_under(inner), direction))
    made: list[np.ndarray[Any, Any]] = []
    labels: list[np.ndarray[Any, Any]] = []
    for batch, rows in batches:
        kept = rows >= 0
        made.append(
            np.asarray(run(inner, {name: jnp.asarray(array) for name, array in batch.items()}))[
                kept
            ]
        )
        labels.append(batch["labels"][kept])
    return np.concatenate(made), np.concatenate(labels)


def centroid_accuracy(rows: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Return the share of rows whose own class has the nearest mean, each row left out of its own
    class's.

    Args:
        rows: `[n, d]`, each of norm one.
        labels: class ids, int `[n]`.

    Raises:
        DataError: there are fewer than two classes, or no class has two rows.
    """
    classes, own = np.unique(labels, return_inverse=True)
    counts = np.bincount(own)
    if len(classes) < 2 or counts.max() < 2:
        raise DataError(
            f"{len(labels)} rows of {len(classes)} classes: the nearest class needs at least two"
            " classes, and two rows in one of them"
        )
    wide = rows.astype(np.float64)
    sums = np.zeros((len(classes), wide.shape[1]))
    np.add.at(sums, own, wide)
    near = wide @ _directions(sums).T
    near[np.arange(len(own)), own] = (wide * _directions(sums[own] - wide)).sum(1)
    counted = counts[own] > 1
    return float((near.argmax(1) == own)[counted].mean())


def _directions(rows: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _LEAST)
