"""A run as values: its description, which stays, and its state, which the loop passes on."""

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
        setup: the prepared run.
        method: what is trained, as it was started.
        optimizer: over the trainable part of the tree.
        frozen: the rest of the tree.
        shardings: of each leaf of the train state.
        identity: what makes the run this run, for its checkpoints.
        checkpoints: where steps are saved.
        evaluator: of the setup.
        metrics: takes the figures of each step.
        stop: asked before each step.
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
        """The axis of rows of a batch's arrays: 1 behind an axis of micro-batches."""
        return int(self.setup.config.train.accumulation > 1)


@dataclass(frozen=True)
class EvaluationProgress:
    """How far the evaluations of a run are: saved beside each checkpoint.

    Attributes:
        evaluated: the step of the last evaluation.
        best_step: the step with the best figure, None before the first evaluation.
        best: that figure.
        worse: evaluations since then.
        stopped_early: whether `evaluation.patience` has run out.
        seconds: spent so far.
    """

    evaluated: int = -1
    best_step: int | None = None
    best: float | None = None
    worse: int = 0
    stopped_early: bool = False
    seconds: float = 0.0


@dataclass(frozen=True)
class LoopState:
    """What the loop passes on from step to step.

    Attributes:
        train: what the compiled step changes.
        step: steps done, known without asking the devices.
        position: where the data goes on.
        progress: of the evaluations.
        best: the trainable part at the best step, None before the first evaluation.
        best_figures: of the validation rows at that step, None where they were not evaluated since
            the start of the process.
    """

    train: TrainState
    step: int = 0
    position: Position = field(default_factory=dict[str, Any])
    progress: EvaluationProgress = EvaluationProgress()
    best: Tree | None = None
    best_figures: Mapping[str, float] | None = None


@dataclass(frozen=True)
class RunResult:
    """What a finished run gives.

    Attributes:
        method: what was trained.
        trainable: the trained part of the tree at the best step.
        frozen: the rest.
        steps: steps done.
        best_step: the step of `trainable`.
        split: `test`, or `validation` where there are no test rows: those that chose the best step.
        test: the figures of its rows.
        seconds: spent on training over all resumptions, evaluations and their compilation included,
            that of the step not.
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
        """The whole tree."""
        return tree.combine(self.trainable, self.frozen)

    @property
    def trainable_parameters(self) -> int:
        """How many are trained."""
        return tree.count(self.trainable)

    @property
    def total_parameters(self) -> int:
        """How many there are in all, adapter included."""
        return tree.count(self.trainable) + tree.count(self.frozen)
