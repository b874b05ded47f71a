"""Forgetting: the nearest mean with each row left out, and embeddings with the head off and the
adapter on.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core.tree import stack_layers
from jaxpeft.errors import DataError
from jaxpeft.evaluation.forgetting import Forgetting, centroid_accuracy, embeddings
from jaxpeft.methods import BitFit, LoRA, PTuningV2
from tests.train.runs import tiny_models

__all__ = ["tiny_models"]


def units(rows: Any) -> np.ndarray:
    return np.asarray(rows) / np.linalg.norm(rows, axis=1, keepdims=True)


def batches(n: int = 6) -> list[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Make two batches, of which the last row is no row."""
    rng = np.random.default_rng(0)
    mask = (np.arange(8) < rng.integers(2, 8, (n, 1))).astype(np.int32)
    ids = rng.integers(5, 60, (n, 8)).astype(np.int32) * mask
    rows, labels, half = np.arange(n), np.arange(n, dtype=np.int32) % 2, n // 2
    rows[-1] = -1
    return [
        ({"input_ids": ids[at], "attention_mask": mask[at], "labels": labels[at]}, rows[at])
        for at in (slice(0, half), slice(half, n))
    ]


def test_the_nearest_mean_is_that_of_the_others_of_the_class() -> None:
    rng = np.random.default_rng(1)
    rows, labels = units(rng.normal(size=(40, 5))), rng.integers(0, 4, 40)
    right = []
    for i in range(40):
        others = np.arange(40) != i
        means = [units(rows[others & (labels == k)].sum(0, keepdims=True))[0] for k in range(4)]
        right.append(np.argmax(np.stack(means) @ rows[i]) == labels[i])
    assert centroid_accuracy(rows, labels) == pytest.approx(np.mean(right))


def test_classes_that_stand_apart_are_all_right_and_a_row_alone_is_not_counted() -> None:
    rows = np.eye(3)[[0, 0, 1, 1, 2]]
    assert centroid_accuracy(rows, np.array([5, 5, 9, 9, 7])) == 1.0
    assert centroid_accuracy(rows, np.array([5, 9, 9, 5, 7])) == 0.0


@pytest.mark.parametrize("labels", [[1, 1, 1], [1, 2, 3]])
def test_too_few_classes_or_rows_are_refused(labels: list[int]) -> None:
    with pytest.raises(
        DataError, match=r"3 rows of [13] classes: the centroid accuracy needs at least two classes"
    ):
        centroid_accuracy(np.eye(3), np.array(labels))


def test_what_is_lost_is_positive_where_it_is_worse() -> None:
    assert Forgetting("centroid_accuracy", 0.9, 0.8).lost == pytest.approx(0.1)
    assert Forgetting("loss", 2.0, 2.5).lost == pytest.approx(0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.representatives("llama")
def test_embeddings_are_means_of_the_encoders_hidden_states(
    tiny_models: Mapping[str, Path], kind: str
) -> None:
    model, params = jaxpeft.load(tiny_models[kind], task="sequence_classification", num_labels=3)
    encoder, base = jaxpeft.load(tiny_models[kind], task="encoder")
    got, labels = embeddings(model, params, batches())
    wanted = []
    for batch, rows in batches():
        hidden = np.asarray(
            jaxpeft.apply(encoder, base, batch["input_ids"], batch["attention_mask"])
        )
        token = batch["attention_mask"][..., None]
        wanted.append(((hidden * token).sum(1) / token.sum(1))[rows >= 0])
    np.testing.assert_allclose(got, units(np.concatenate(wanted)), rtol=1e-4, atol=1e-5)
    assert labels.tolist() == [0, 1, 0, 1, 0]


@pytest.mark.slow
@pytest.mark.parametrize("method", [LoRA(), PTuningV2(), BitFit()], ids=lambda method: method.name)
def test_embeddings_are_those_of_the_adapted_backbone_scanned_or_not(
    tiny_models: Mapping[str, Path], method: jaxpeft.Method
) -> None:
    model, params = jaxpeft.load(tiny_models["bert"], task="sequence_classification", num_labels=3)
    made = jaxpeft.rewrite(method, params, jax.random.key(0))
    mask = jaxpeft.trainable_mask(method, made)
    moved = jax.tree.map(
        lambda leaf, on: (
            leaf + 0.1 * jnp.sin(jnp.arange(leaf.size)).reshape(leaf.shape) if on else leaf
        ),
        made,
        mask,
    )
    before, after = embeddings(model, params, batches())[0], embeddings(model, moved, batches())[0]
    assert np.abs(before - after).max() > 1e-3
    scanned = model.clone(
        options=model.options.__class__(**{**vars(model.options), "scan_layers": True})
    )
    np.testing.assert_allclose(
        embeddings(scanned, stack_layers(moved), batches())[0], after, atol=1e-4
    )
