"""The training loop: steps, evaluations and checkpoints."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing, nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft.core import training_hooks
from jaxpeft.core.paths import Tree
from jaxpeft.data.batches.training import Position
from jaxpeft.logs import log_time
from jaxpeft.processes.arrays import own_rows, put_batch
from jaxpeft.processes.signals import Stopped
from jaxpeft.sharding.mesh import batch_shardings, has_positions
from jaxpeft.train import compiling, records
from jaxpeft.train.begin import fixed_leaves
from jaxpeft.train.evaluator import better, metric_of
from jaxpeft.train.run import EvaluationProgress, LoopState, Run, RunResult
from jaxpeft.train.step import TrainState, jit_train_step, make_train_step

_log = logging.getLogger(__name__)
Step = Callable[[TrainState, Tree, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]
Feed = Generator[tuple[Mapping[str, Any], Position]]


def fit(run: Run, state: LoopState) -> RunResult:
    """Train to the end and evaluate the best step.

    Raises:
        Stopped: a signal requested a stop; the last finished step is saved.
        TrainingError: the loss is not finite.
    """
    try:
        return conclude(run, train(run, state))
    finally:
        run.checkpoints.close()
        run.metrics.close()


def train(run: Run, state: LoopState) -> LoopState:
    """Train and save; return the final state. If a signal requests a stop, save the last finished
    step.
    """
    if is_finished(run, state):
        return state
    setup = run.setup
    try:
        compiled = compile_steps(run, state.train)
        run.metrics.start_clock(state.progress.seconds)
        if evaluation_due(run, state):
            state = evaluate(run, state)
        own = own_rows(setup.mesh, setup.config.train.batch_size // setup.config.train.accumulation)
        batches = setup.data.batches.feed(
            state.position, setup.steps, run.stop.raise_while_waiting, own
        )
        first = state.step
        with run.metrics.show_progress(first) as report, closing(batches):
            while not is_finished(run, state):
                state = train_step(run, compiled, state, batches, wait=state.step == first)
                report(state.step)
                saves = ends_period(run, state.step, setup.config.checkpoint.every_steps)
                if evaluation_due(run, state) or saves or is_finished(run, state):
                    # so that pending steps do not count as evaluation or saving time
                    jax.block_until_ready(state.train)
                    with run.metrics.pause_clock():
                        if evaluation_due(run, state):
                            state = evaluate(run, state)
                        if saves or is_finished(run, state):
                            state = save(run, state)
    except Stopped as stopped:
        _say_stopped(stopped, save(run, state))
        raise
    return state


def train_step(
    run: Run, compiled: Mapping[int, Step], state: LoopState, batches: Feed, *, wait: bool
) -> LoopState:
    """Run one step on the next batch.

    Args:
        run: the run.
        compiled: compiled step by padded length.
        state: loop state; its train state is donated.
        batches: batches of the run, each with the data position after it.
        wait: whether to wait for the result, as for the first step.

    Raises:
        Stopped: a signal requested a stop before the step.
    """
    run.stop.raise_if_requested()
    with log_time("the first batch and step") if wait else nullcontext():
        batch, position = next(batches)
        step = compiled[batch["input_ids"].shape[-1]]
        done, metrics = step(
            state.train, run.frozen, put_batch(run.setup.mesh, batch, run.row_axis)
        )
        jax.block_until_ready(metrics if wait else ())
    run.metrics.add(state.step + 1, position, metrics)
    return dataclasses.replace(state, train=done, step=state.step + 1, position=position)


def evaluate(run: Run, state: LoopState) -> LoopState:
    """Evaluate on the validation rows; copy the parameters if they are the best so far."""
    run.metrics.flush()
    trainable, before = state.train.trainable, state.progress
    figures = run.evaluator(trainable, run.frozen, run.setup.data.validation)
    run.metrics.write(state.step, {f"validation/{name}": value for name, value in figures.items()})
    metric, patience = metric_of(run.setup), run.setup.config.evaluation.patience
    improved = better(metric, figures[metric], before.best)
    worse = 0 if improved else before.worse + 1
    progress = EvaluationProgress(
        evaluated=state.step,
        best_step=state.step if improved else before.best_step,
        best=figures[metric] if improved else before.best,
        worse=worse,
        stopped_early=patience is not None and worse >= patience,
        seconds=before.seconds,
    )
    shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
    _log.info(
        "%s step %d validation: %s%s",
        run.method.name,
        state.step,
        shown,
        "  (best so far)" if improved else "",
    )
    if progress.stopped_early:
        _log.info("stopping early: no better %s in %d evaluations", metric, worse)
    state = dataclasses.replace(state, progress=progress)
    return (
        dataclasses.replace(state, best=_copy(trainable, state.best), best_figures=figures)
        if improved
        else state
    )


def _copy(trainable: Tree, before: Tree | None) -> Tree:
    """Copy the parameters, since the train step donates them; free the previous best copy."""
    for leaf in jax.tree.leaves(before):
        leaf.delete()
    return jax.tree.map(jnp.copy, trainable)


def save(run: Run, state: LoopState) -> LoopState:
    """Save a checkpoint; return the state with the training time updated."""
    run.metrics.flush()
    progress = dataclasses.replace(state.progress, seconds=run.metrics.seconds)
    meta = {
        "identity": run.identity,
        "progress": dataclasses.asdict(progress),
        "position": state.position,
        "method": run.method.as_dict(),
    }
    run.checkpoints.save(
        state.step, state.train, state.best, meta, fixed_leaves(run.method, run.frozen)
    )
    return dataclasses.replace(state, progress=progress)


def conclude(run: Run, state: LoopState) -> RunResult:
    """Evaluate the best step on the test rows, or on the validation rows if there are none."""
    setup, split = run.setup, run.setup.data.judged_by
    best = state.best if state.best is not None else state.train.trainable
    known = state.best_figures if split == "validation" else None
    try:
        test = (
            dict(known) if known is not None else run.evaluator(best, run.frozen, setup.data.test)
        )
    except Stopped as stopped:
        _say_stopped(stopped, state)
        raise
    run.metrics.write(
        state.step, {f"{records.FINAL[split]}/{name}": value for name, value in test.items()}
    )
    best_step = state.progress.best_step if state.progress.best_step is not None else state.step
    return RunResult(
        run.method, best, run.frozen, state.step, best_step, split, test, state.progress.seconds
    )


def _say_stopped(stopped: Stopped, saved: LoopState) -> None:
    stopped.saved = True
    _log.info("stopped on request; step %d is saved, the same command resumes from it", saved.step)


# ---------------------------------------------------------------------------------------- schedules


def is_finished(run: Run, state: LoopState) -> bool:
    """Return whether all steps and evaluations are done."""
    return state.progress.stopped_early or (
        state.step >= run.setup.steps and not evaluation_due(run, state)
    )


def evaluation_due(run: Run, state: LoopState) -> bool:
    """Return whether the state must be evaluated and has not been."""
    ends = ends_period(run, state.step, run.setup.config.evaluation.every_steps)
    return (state.step == run.setup.steps or ends) and state.progress.evaluated != state.step


def ends_period(run: Run, step: int, period: int | None) -> bool:
    """Return whether a step is a multiple of `period` steps; None means an epoch."""
    every = period or run.setup.data.batches.steps_per_epoch
    return every is not None and step > 0 and step % every == 0


# ----------------------------------------------------------------------------------- compiled steps


def compile_steps(run: Run, state: TrainState) -> Mapping[int, Step]:
    """Compile the step for every padded length before training."""
    setup, mesh, lengths = run.setup, run.setup.mesh, run.setup.data.batches.lengths
    parts, penalty = setup.config.train.accumulation, partial(training_hooks.penalty, run.method)
    train_step = make_train_step(setup.model, setup.loss, run.optimizer, parts, penalty)
    step = jit_train_step(train_step, mesh, run.shardings, compiling.options(mesh.devices.flat[0]))
    run.stop.raise_if_requested()
    with log_time(
        f"compiling the {run.method.name} step for rows of {' or '.join(map(str, lengths))} tokens"
    ):
        sample = setup.data.batches.sample()
        batches = (_abstract_batch(sample, length, mesh, run.row_axis) for length in lengths)
        lowered = [step.lower(state, run.frozen, batch) for batch in batches]
        return dict(
            zip(lengths, compiling.compile_each(lowered, mesh.devices.flat[0]), strict=True)
        )


def _abstract_batch(
    batch: Mapping[str, np.ndarray[Any, Any]], length: int, mesh: Mesh, axis: int
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes and shardings of a batch with rows padded to `length`."""
    ids = batch["input_ids"].shape

    shapes = {
        name: jax.ShapeDtypeStruct(
            (*ids[:-1], length) if has_positions(a, ids) else a.shape, a.dtype
        )
        for name, a in batch.items()
    }
    where = batch_shardings(mesh, shapes, axis)
    return {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where[name])
        for name, a in shapes.items()
    }
