"""Metrics of a run's steps: fetched from the devices periodically, checked, written and shown."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import optax

from jaxpeft.core.paths import Tree
from jaxpeft.data.batches.training import Position
from jaxpeft.train import flops, records
from jaxpeft.train.progress import StepProgress, memory_gb
from jaxpeft.train.setup import Setup
from jaxpeft.train.watch import Watch


class StepMetrics:
    """Collects step metrics on the devices until they are written, so that dispatch never waits.

    Args:
        setup: prepared run.
        name: name of the method.
        learning_rate: learning rate schedule.
        trainable: trainable part of the tree.
        frozen: frozen part of the tree.
        writers: metric writers.
        newest: returns a description of the newest checkpoint.
        seconds: training time before this process.
    """

    def __init__(
        self,
        setup: Setup,
        name: str,
        learning_rate: optax.Schedule,
        trainable: Tree,
        frozen: Tree,
        writers: Sequence[records.Writer],
        newest: Callable[[], str],
        seconds: float,
    ) -> None:
        self._setup, self._name, self._schedule = setup, name, learning_rate
        self._writers, self._newest = writers, newest
        self._watch = Watch(_names(trainable), setup.config.train.most_skipped, _chance(setup))
        self._flops_per_token = flops.per_token(
            trainable, frozen, flops.active_share(setup.model.config)
        )
        self._peak = flops.peak(devices_of(frozen) or devices_of(trainable))
        self._pending: list[tuple[int, Position, Mapping[str, jax.Array]]] = []
        self._tokens, self._aside = 0, 0.0
        self.start_clock(seconds)

    def start_clock(self, seconds: float) -> None:
        """Start counting training time, in addition to the `seconds` already spent."""
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Training time so far."""
        return time.perf_counter() - self._started

    def add(self, step: int, position: Position, metrics: Mapping[str, jax.Array]) -> None:
        """Add the metrics of a step, which may still be computing."""
        self._pending.append((step, position, metrics))

    def flush(self) -> float:
        """Write the metrics of the steps since the last flush; return the last loss, NaN if there
        is none.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        loss = math.nan
        for step, position, metrics in self._pending:
            loss, tokens = float(metrics["loss"]), int(metrics["tokens"])
            self._tokens += tokens
            rows = self._setup.data.batches.describe_batch(position)
            figures = self._watch.see(step, rows, metrics)
            self.write(step, figures | {"learning_rate": self._rate(step), "tokens": tokens})
            self._watch.stop_if_too_many(self._newest)
        self._pending.clear()
        return loss

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Write metrics of a step."""
        for writer in self._writers:
            writer.write(step, figures)

    @contextmanager
    def pause_clock(self) -> Generator[None]:
        """Exclude the time spent in this context from the training speed."""
        began = time.perf_counter()
        yield
        self._aside += time.perf_counter() - began

    @contextmanager
    def show_progress(self, done: int) -> Generator[Callable[[int], None]]:
        """Show the progress of the steps.

        Args:
            done: number of steps already done.

        Yields:
            A function to call with the step number after each step, which writes and shows metrics
            when due.
        """
        log, steps = self._setup.config.log, self._setup.steps
        progress = StepProgress(log.progress, self._name, steps, done)
        last, tokens = time.perf_counter(), self._tokens

        def report(step: int) -> None:
            nonlocal last, tokens
            if step != steps and step % log.every_steps:
                return
            loss = self.flush()
            # exclude evaluation and saving from the training speed
            seconds = time.perf_counter() - last - self._aside
            progress.update(
                step, self._figures(step, loss, (self._tokens - tokens) / max(seconds, 1e-9))
            )
            last, tokens, self._aside = time.perf_counter(), self._tokens, 0.0

        try:
            yield report
        finally:
            progress.close()

    def _figures(self, step: int, loss: float, tokens_per_second: float) -> str:
        """Write the training speed; return it formatted, with the loss."""
        work, memory = tokens_per_second * self._flops_per_token, memory_gb()
        used = f"MFU {work / self._peak:.1%}" if self._peak else f"{work / 1e9:.1f} GFLOP/s"
        speed = {
            "tokens_per_second": tokens_per_second,
            "model_flops_per_second": work,
            "memory_gb": memory,
        }
        self.write(step, speed)
        return (
            f"loss {loss:.4f}  lr {self._rate(step):.2e}  {tokens_per_second:,.0f} tok/s  {used} "
            f" {memory:.2f} GB"
        )

    def _rate(self, step: int) -> float:
        return float(np.asarray(self._schedule(step - 1)))

    def close(self) -> None:
        """Close the metric writers."""
        for writer in self._writers:
            writer.close()


def _names(trainable: Tree) -> list[str]:
    leaves = jax.tree.leaves_with_path(trainable)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]


def _chance(setup: Setup) -> float | None:
    """Return the loss of a uniform guess over n classes, ln n; None for other problems."""
    classes = (
        setup.model.config.vocab_size if setup.data.problem == "lm" else len(setup.data.labels)
    )
    return math.log(classes) if setup.data.problem in ("lm", "single_label", "token") else None


def devices_of(params: Tree) -> list[Any]:
    """Return the devices of a tree's leaves."""
    found = {
        device
        for leaf in jax.tree.leaves(params)
        if isinstance(leaf, jax.Array)
        for device in leaf.devices()
    }
    return sorted(found, key=lambda device: device.id)
