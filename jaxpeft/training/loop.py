"""The loop: steps, evaluations, checkpoints, reports. It knows a method only as something that rewrites and masks."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft.checkpoint.identity import tree_spec
from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.config.schema import OptimizerConfig
from jaxpeft.core import paths, training_hooks, tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.data.batches import Position
from jaxpeft.logs import timed
from jaxpeft.sharding.mesh import batch_shardings, has_positions, place
from jaxpeft.sharding.processes import own_rows, put
from jaxpeft.sharding.specs import state_shardings
from jaxpeft.training import base_record, compiling, flops, optimizers, records
from jaxpeft.training.begin import Look, begun, fixed_leaves, method_of, rewritten
from jaxpeft.training.evaluation import Evaluator, better, metric_of
from jaxpeft.training.progress import StepProgress, memory_gb
from jaxpeft.training.setup import Setup
from jaxpeft.training.signals import Stopped, StopRequest
from jaxpeft.training.step import TrainState, init_state, jit_train_step, make_train_step
from jaxpeft.training.watch import Watch

_log = logging.getLogger(__name__)
Step = Callable[[TrainState, Tree, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True)
class Progress:
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
class Result:
    """What a finished run gives.

    Attributes:
        method: what was trained.
        trainable: the trained part of the tree at the best step.
        frozen: the rest.
        steps: steps done.
        best_step: the step of `trainable`.
        split: `test`, or `validation` where there are no test rows: those that chose the best step.
        test: the figures of its rows.
        seconds: spent on training over all resumptions, evaluations and their compilation included, that of the step not.
        trainable_parameters: how many.
        total_parameters: how many in all, adapter included.
    """

    method: Method
    trainable: Tree
    frozen: Tree
    steps: int
    best_step: int
    split: str
    test: dict[str, float]
    seconds: float
    trainable_parameters: int
    total_parameters: int

    @property
    def params(self) -> Tree:
        """The whole tree."""
        return tree.combine(self.trainable, self.frozen)


def identity_of(setup: Setup, method: Method, trainable: Tree) -> dict[str, Any]:
    """Return what makes a run this run."""
    return dict(setup.identity) | {"method": method.as_dict(), "tree": tree_spec(trainable), "steps": setup.steps}


def check_resumable(setup: Setup, method: Method, folder: Path, allowed: Sequence[str]) -> None:
    """Refuse, before anything is computed, to go on from another run's checkpoints.

    Args:
        setup: the prepared run.
        method: that will be trained.
        folder: of the run.
        allowed: fields that may differ.

    Raises:
        ConfigError: the checkpoints are another run's, or tensors of the base have changed since.
        CheckpointError: none of them is good.
    """
    checkpoints = Checkpoints(folder / "checkpoints", setup.config.checkpoint.keep, setup.peers)
    latest = checkpoints.latest()
    if latest is not None:
        find = partial(base_record.changed, folder, setup.base_tensors)
        base_record.require_same(setup.peers.agreed("changed tensors of the base", find), allowed)
        started = method_of(checkpoints.read_meta(latest), method)
        trainable, _ = jax.eval_shape(lambda: rewritten(setup, started))
        checkpoints.check_identity(latest, identity_of(setup, method, trainable), allowed)


class Run:
    """One method trained on one prepared setup.

    Args:
        setup: the prepared run.
        method: what to train.
        options: the optimizer's.
        folder: where checkpoints and figures go.
        stop: asked before each step.
        evaluator: of the setup.
        allowed: fields that may differ from those of the checkpoint that is gone on from.
        look: is shown the two parts of the tree before any training.
    """

    def __init__(
        self,
        setup: Setup,
        method: Method,
        options: OptimizerConfig,
        folder: Path,
        stop: StopRequest,
        evaluator: Evaluator,
        allowed: Sequence[str] = (),
        look: Look | None = None,
    ) -> None:
        self.allowed = allowed
        self.setup, self.stop, self.folder = setup, stop, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = Checkpoints(folder / "checkpoints", setup.config.checkpoint.keep, setup.peers)
        self.latest = self.checkpoints.latest()
        meta = None if self.latest is None else self.checkpoints.read_meta(self.latest)
        self.method, trainable, self.frozen = begun(setup, method, meta, look)
        self.optimizer = optimizers.build(options, setup.steps, self.method)
        self.rate = optimizers.schedule(options, options.learning_rate, setup.steps)
        state = init_state(trainable, self.optimizer, setup.config.train.seed)
        where = jax.tree.map(lambda leaf: leaf.sharding, trainable)
        self.places = state_shardings(setup.mesh, state, trainable, where)
        self.state = put(state, self.places)
        self.row_axis = int(setup.config.train.accumulation > 1)
        self.own = own_rows(setup.mesh, setup.config.train.batch_size // setup.config.train.accumulation)
        self.tokens = 0
        self.position: Position = {}
        self.best: Tree | None = None
        self.best_figures: dict[str, float] | None = (
            None  # of the validation rows, where they were evaluated since the start
        )
        self.progress = Progress()
        self.evaluator = evaluator
        self.identity = identity_of(setup, method, trainable)
        self.step = 0
        self.pending: list[tuple[int, Position, dict[str, jax.Array]]] = []
        self.writers: list[records.Writer] = []
        self.started = time.perf_counter()
        self.aside = 0.0
        self.watch = Watch(_names(trainable), setup.config.train.most_skipped, _chance(setup))
        self.flops_per_token = flops.per_token(trainable, self.frozen)
        self.sizes = tree.count(trainable), tree.count(trainable) + tree.count(self.frozen)

    def fit(self) -> Result:
        """Train to the end, going on from the newest checkpoint if there is one.

        Raises:
            Stopped: a signal asked to; the last finished step is saved.
            ConfigError: the checkpoints are another run's.
            TrainingError: the loss is not finite.
        """
        self._resume()
        if self.setup.peers.first:
            (self.folder / "config.json").write_text(json.dumps(self.setup.identity["config"], indent=2) + "\n")
            base_record.write(self.folder, self.setup.base_tensors)
        share = f"{self.sizes[0]:,} of {self.sizes[1]:,} parameters ({self.sizes[0] / self.sizes[1]:.2%})"
        _log.info("%s trains %s", self.method.name, share)
        if self.setup.peers.first:
            self.writers = records.open_writers(self.setup.config.log, self.folder, self.step)
        try:
            if not self._finished():
                step = self._compiled()
                self.started = time.perf_counter() - self.progress.seconds
                self._train(step)
            best = self.best if self.best is not None else self.state.trainable
            known = self.best_figures if self.setup.judged_by == "validation" else None
            test = known if known is not None else self.evaluator(best, self.frozen, self.setup.test)
            prefix = records.FINAL[self.setup.judged_by]
            self._write(self.step, {f"{prefix}/{name}": value for name, value in test.items()})
        except Stopped as stopped:
            self._save()
            stopped.saved = True
            _log.info("stopped on request; step %d is saved, the same command resumes from it", self.step)
            raise
        finally:
            self.checkpoints.close()
            for writer in self.writers:
                writer.close()
        best_step = self.progress.best_step if self.progress.best_step is not None else self.step
        seconds = self.progress.seconds
        split = self.setup.judged_by
        return Result(self.method, best, self.frozen, self.step, best_step, split, test, seconds, *self.sizes)

    def _resume(self) -> None:
        latest = self.latest
        if latest is not None:
            self.checkpoints.check_identity(latest, self.identity, self.allowed)
        self.checkpoints.put_aside(latest)
        if latest is None:
            return
        with timed(f"restoring step {latest} from {self.folder / 'checkpoints'}"):
            fixed = fixed_leaves(self.method, self.frozen)
            state, self.best, fixed = self.checkpoints.restore(latest, self.state, self.state.trainable, fixed)
        self.state = TrainState(*state)
        self.frozen = paths.map_with_path(lambda path, leaf: fixed.get(paths.text(path), leaf), self.frozen)
        meta = self.checkpoints.read_meta(latest)
        self.progress, self.position, self.step = Progress(**meta["progress"]), meta["position"], latest

    def _finished(self) -> bool:
        return self.progress.stopped_early or (self.step >= self.setup.steps and not self._evaluation_due())

    def _compiled(self) -> Mapping[int, Step]:
        """Compile the step for every padded length, so that nothing is compiled while training."""
        setup = self.setup
        parts = setup.config.train.accumulation
        train_step = make_train_step(
            setup.model, setup.loss, self.optimizer, parts, partial(training_hooks.penalty, self.method)
        )
        how = compiling.options(setup.mesh.devices.flat[0])
        step = jit_train_step(train_step, setup.mesh, self.places, how)
        lengths = setup.batches.lengths
        self.stop.raise_if_requested()
        with timed(f"compiling the {self.method.name} step for rows of {' or '.join(map(str, lengths))} tokens"):
            sample = setup.batches.sample()
            batches = (_abstract_batch(sample, length, setup.mesh, self.row_axis) for length in lengths)
            lowered = [step.lower(self.state, self.frozen, batch) for batch in batches]
            return dict(zip(lengths, compiling.compile_each(lowered, setup.mesh.devices.flat[0]), strict=True))

    def _train(self, compiled: Mapping[int, Step]) -> None:
        if self._evaluation_due():
            self._evaluate()
        mesh, feed = self.setup.mesh, self.setup.batches.feed
        batches = feed(self.position, self.setup.steps, self.stop.raise_while_waiting, self.own)
        with self._progress_shown() as report, closing(batches):
            first = True
            while not self._finished():
                self.stop.raise_if_requested()
                with timed("the first batch and step") if first else nullcontext():
                    batch, position = next(batches)
                    run = compiled[batch["input_ids"].shape[-1]]
                    self.state, metrics = run(self.state, self.frozen, place(mesh, batch, self.row_axis))
                    jax.block_until_ready(metrics if first else ())
                    first = False
                self.step, self.position = self.step + 1, position
                self.pending.append((self.step, position, metrics))
                last = self.step == self.setup.steps
                report(last or self.step % self.setup.config.log.every_steps == 0)
                saves = self._ends_a(self.setup.config.checkpoint.every_steps)
                if self._evaluation_due() or saves or self._finished():
                    jax.block_until_ready(self.state)  # steps that are only dispatched are no part of what follows
                    with self._aside():
                        if self._evaluation_due():
                            self._evaluate()
                        if saves or self._finished():
                            self._save()

    @contextmanager
    def _aside(self) -> Generator[None]:
        """Count the time that is spent on something else than steps."""
        began = time.perf_counter()
        yield
        self.aside += time.perf_counter() - began

    @contextmanager
    def _progress_shown(self) -> Generator[Callable[[bool], None]]:
        shown = StepProgress(self.setup.config.log.progress, self.method.name, self.setup.steps, self.step)
        last, tokens = [time.perf_counter()], [self.tokens]

        def report(due: bool) -> None:
            if not due:
                return
            loss = self._flush()
            # what evaluating and saving took is not the training's speed
            seconds = time.perf_counter() - last[0] - self.aside
            shown.update(self.step, self._figures(loss, (self.tokens - tokens[0]) / max(seconds, 1e-9)))
            last[0], tokens[0], self.aside = time.perf_counter(), self.tokens, 0.0

        try:
            yield report
        finally:
            shown.close()

    def _figures(self, loss: float, tokens_per_second: float) -> str:
        rate = self._rate(self.step)
        work, most = (
            tokens_per_second * self.flops_per_token,
            flops.peak(devices_of(self.frozen) or devices_of(self.state.trainable)),
        )
        used = f"MFU {work / most:.1%}" if most else f"{work / 1e9:.1f} GFLOP/s"
        memory = memory_gb()
        speed = {"tokens_per_second": tokens_per_second, "model_flops_per_second": work, "memory_gb": memory}
        self._write(self.step, speed)
        return f"loss {loss:.4f}  lr {rate:.2e}  {tokens_per_second:,.0f} tok/s  {used}  {memory:.2f} GB"

    def _flush(self) -> float:
        """Write the figures of the steps since the last time; they are read here, not step by step.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        loss = math.nan
        for step, position, metrics in self.pending:
            loss, tokens = float(metrics["loss"]), int(metrics["tokens"])
            self.tokens += tokens
            seen = self.watch.see(step, self.setup.batches.told(position), metrics)
            self._write(step, seen | {"learning_rate": self._rate(step), "tokens": tokens})
            self.watch.stop_if_too_many(self._newest)
        self.pending.clear()
        return loss

    def _newest(self) -> str:
        latest = self.checkpoints.latest()
        return "no step is saved yet" if latest is None else f"the newest checkpoint is step {latest}, and is finite"

    def _rate(self, step: int) -> float:
        return float(np.asarray(self.rate(step - 1)))

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(step, figures)

    def _evaluation_due(self) -> bool:
        on_this_step = self.step == self.setup.steps or self._ends_a(self.setup.config.evaluation.every_steps)
        return on_this_step and self.progress.evaluated != self.step

    def _ends_a(self, period: int | None) -> bool:
        """Return whether this step is the last of a period of so many steps, None for an epoch."""
        every = period or self.setup.batches.steps_per_epoch
        return every is not None and self.step > 0 and self.step % every == 0

    def _evaluate(self) -> None:
        """Evaluate the validation rows, and keep the tree if it is the best so far."""
        self._flush()
        figures = self.evaluator(self.state.trainable, self.frozen, self.setup.validation)
        self._write(self.step, {f"validation/{name}": value for name, value in figures.items()})
        metric = metric_of(self.setup)
        won = better(metric, figures[metric], self.progress.best)
        if won:
            self.best, self.best_figures = jax.tree.map(jnp.copy, self.state.trainable), figures
        patience = self.setup.config.evaluation.patience
        worse = 0 if won else self.progress.worse + 1
        self.progress = Progress(
            evaluated=self.step,
            best_step=self.step if won else self.progress.best_step,
            best=figures[metric] if won else self.progress.best,
            worse=worse,
            stopped_early=patience is not None and worse >= patience,
            seconds=self.progress.seconds,
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        _log.info("%s step %d validation: %s%s", self.method.name, self.step, shown, "  (best so far)" if won else "")
        if self.progress.stopped_early:
            _log.info("stopping early: no better %s in %d evaluations", metric, worse)

    def _save(self) -> None:
        self._flush()
        self.progress = dataclasses.replace(self.progress, seconds=time.perf_counter() - self.started)
        progress = dataclasses.asdict(self.progress)
        meta = {
            "identity": self.identity,
            "progress": progress,
            "position": self.position,
            "method": self.method.as_dict(),
        }
        self.checkpoints.save(self.step, self.state, self.best, meta, fixed_leaves(self.method, self.frozen))


def _names(trainable: Tree) -> list[str]:
    leaves = jax.tree.leaves_with_path(trainable)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _chance(setup: Setup) -> float | None:
    """Return the loss of a guess: of a classification into n classes, ln n."""
    classes = setup.model.config.vocab_size if setup.problem == "lm" else len(setup.labels)
    return math.log(classes) if setup.problem in ("lm", "single_label", "token") else None


def devices_of(params: Tree) -> list[Any]:
    """Return the devices that a tree's leaves are on."""
    found = {device for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) for device in leaf.devices()}
    return sorted(found, key=lambda device: device.id)


def _abstract_batch(
    batch: Mapping[str, np.ndarray[Any, Any]], length: int, mesh: Mesh, axis: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch whose rows are padded to `length`, and where they lie."""
    ids = batch["input_ids"].shape

    shapes = {
        name: jax.ShapeDtypeStruct((*ids[:-1], length) if has_positions(a, ids) else a.shape, a.dtype)
        for name, a in batch.items()
    }
    where = batch_shardings(mesh, shapes, axis)
    return {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where[name]) for name, a in shapes.items()}
