"""Evaluate parameters on the rows of a split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxpeft import data
from jaxpeft.core.paths import Tree
from jaxpeft.core.tree import combine
from jaxpeft.data.tokens.row_encoder import evaluated_lengths, one_length
from jaxpeft.evaluation.entities import OUTSIDE, has_entities
from jaxpeft.evaluation.metrics import LOWER_IS_BETTER, classification_metrics, lm_metrics
from jaxpeft.processes.arrays import own_rows, put_batch
from jaxpeft.sharding.logical_axes import on_mesh
from jaxpeft.sharding.mesh import evaluation_rows, replicated_sharding
from jaxpeft.train import compiling
from jaxpeft.train.outputs import Outputs
from jaxpeft.train.setup import Encoded, Setup

_DEFAULT_METRIC = {"lm": "loss", "regression": "pearson", "multi_label": "f1_micro"}


class Evaluator:
    """Evaluates with one compiled program per method and padded length.

    Args:
        setup: prepared run.
        on_batch: called before each batch; may raise to stop.
    """

    def __init__(self, setup: Setup, on_batch: Callable[[], None] = lambda: None) -> None:
        self._setup, self._on_batch = setup, on_batch
        how = compiling.options(setup.mesh.devices.flat[0])
        # replicated, so that every process has the outputs of all rows
        self._run = jax.jit(
            on_mesh(setup.mesh, self._forward),
            out_shardings=replicated_sharding(setup.mesh),
            compiler_options=how,
        )
        self._rows = evaluation_rows(setup.config, setup.mesh)
        self._own = own_rows(setup.mesh, self._rows)

    def _forward(
        self, trainable: Tree, frozen: Tree, batch: Mapping[str, jax.Array]
    ) -> tuple[Any, Any, Any, Any]:
        outputs = Outputs(self._setup.model, combine(trainable, frozen), batch, None)
        total, weight = self._setup.plain_loss(outputs, batch)
        # the logits of a language model are large, and not needed
        logits, labels = (
            (None, None) if self._setup.data.problem == "lm" else (outputs.logits, batch["labels"])
        )
        return total, weight, logits, labels

    def __call__(self, trainable: Tree, frozen: Tree, split: Encoded) -> dict[str, float]:
        """Return the metrics of a split: `loss` and those of the problem type.

        Args:
            trainable: trainable part of the tree.
            frozen: frozen part of the tree.
            split: rows to evaluate.
        """
        setup = self._setup
        lengths = evaluated_lengths(setup.config, setup.data.train, split)
        total = weight = 0.0
        logits: list[np.ndarray[Any, Any]] = []
        labels: list[np.ndarray[Any, Any]] = []
        sequences: list[np.ndarray[Any, Any]] = []
        for batch, rows in data.eval_batches(
            split, self._rows, lengths, setup.data.pad_id, self._own, one_length(setup.config)
        ):
            self._on_batch()
            batch_total, batch_weight, out, expected = self._run(
                trainable, frozen, put_batch(setup.mesh, batch)
            )
            total, weight = total + float(batch_total), weight + float(batch_weight)
            if out is not None:
                real = rows >= 0
                out, expected = np.asarray(out)[real], np.asarray(expected)[real]
                if setup.data.problem == "token":  # flat positions, since batches differ in length
                    sequences.append(np.repeat(rows[real], expected.shape[1]))
                    out, expected = out.reshape(-1, out.shape[-1]), expected.reshape(-1)
                logits.append(out)
                labels.append(expected)
        if setup.data.problem == "lm":
            return lm_metrics(total, weight)
        figures = classification_metrics(
            np.concatenate(logits),
            np.concatenate(labels),
            setup.data.problem,  # pyright: ignore[reportArgumentType]
            tags=setup.data.labels,
            rows=np.concatenate(sequences) if sequences else None,
        )
        return {"loss": total / max(weight, 1.0)} | figures


def metric_of(setup: Setup) -> str:
    """Return the metric that selects the best step."""
    return (
        setup.config.evaluation.metric
        or _DEFAULT_METRIC.get(setup.data.problem)
        or _metric_of_labels(setup)
    )


def _metric_of_labels(setup: Setup) -> str:
    if setup.data.problem != "token":
        return "accuracy"
    if has_entities(setup.data.labels):
        return "f1"
    # predicting O everywhere must not be the best answer
    return "tag_f1" if OUTSIDE in setup.data.labels else "tag_f1_macro"


def better(metric: str, value: float, than: float | None) -> bool:
    """Return whether a value is better than the best so far."""
    if math.isnan(value):
        return False
    return than is None or (value < than if metric in LOWER_IS_BETTER else value > than)
