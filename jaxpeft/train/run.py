"""Dataclasses of a run: its fixed description, the state of the loop, and the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import optax

from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.core import tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.data.batches.training import Position
from jaxpeft.processes.signals import StopRequest
from jaxpeft.train.evaluator import Evaluator
from jaxpeft.train.setup import Setup
from jaxpeft.train.step import TrainState
from jaxpeft.train.step_metrics import StepMetrics


@dataclass(frozen=True)
class Run:
    """One method trained on one prepared setup.

    Attributes:
        setup: prepared run.
        method: method to train, after its data-dependent initialization.
        optimizer: optimizer of the trainable part of the tree.
        frozen: frozen part of the tree.
        shardings: sharding of each leaf of the train state.
        identity: identity of the run, saved with its checkpoints.
        checkpoints: checkpoints of the run.
        evaluator: evaluator of the setup.
        metrics: collects the metrics of each step.
        stop: stop request, checked before each step.
    """

    setup: Setup
    method: Method
    optimizer: optax.GradientTransformation
    frozen: Tree
    shardings: Any
    identity: Mapping[str, Any]
    checkpoints: Checkpoints
    evaluator: Evaluator
    metrics: StepMetrics
    stop: StopRequest

    @property
    def row_axis(self) -> int:
        """The axis of rows in a batch's arrays: 1 if there is a leading micro-batch axis."""
        return int(self.setup.config.train.accumulation > 1)


@dataclass(frozen=True)
class EvaluationProgress:
    """Progress of a run's evaluations, saved with each checkpoint.

    Attributes:
        evaluated: step of the last evaluation.
        best_step: step with the best metric, None before the first evaluation.
        best: best metric.
        worse: number of evaluations since the best one.
        stopped_early: whether `evaluation.patience` has run out.
        seconds: training time so far.
    """

    evaluated: int = -1
    best_step: int | None = None
    best: float | None = None
    worse: int = 0
    stopped_early: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class LoopState:
    """State of the training loop.

    Attributes:
        train: train state of the compiled step.
        step: number of steps done, kept on the host.
        position: data position of the next batch.
        progress: progress of the evaluations.
        best: trainable parameters at the best step, None before the first evaluation.
        best_figures: validation metrics at the best step, None if it was not evaluated in this
            process.
    """

    train: TrainState
    step: int = 0
    position: Position = field(default_factory=dict[str, Any])
    progress: EvaluationProgress = EvaluationProgress()
    best: Tree | None = None
    best_figures: Mapping[str, float] | None = None


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run.

    Attributes:
        method: trained method.
        trainable: trainable part of the tree at the best step.
        frozen: frozen part of the tree.
        steps: number of steps done.
        best_step: step of `trainable`.
        split: `test`, or `validation` if there are no test rows.
        test: metrics of that split.
        seconds: training time over all resumptions, with evaluations and their compilation, but
            without compiling the step.
    """

    method: Method
    trainable: Tree
    frozen: Tree
    steps: int
    best_step: int
    split: str
    test: dict[str, float]
    seconds: float

    @property
    def params(self) -> Tree:
        """The complete tree."""
        return tree.combine(self.trainable, self.frozen)

    @property
    def trainable_parameters(self) -> int:
        """Number of trainable parameters."""
        return tree.count(self.trainable)

    @property
    def total_parameters(self) -> int:
        """Number of parameters, including the adapter."""
        return tree.count(self.trainable) + tree.count(self.frozen)
