"""What is watched while a run goes on: steps that are skipped, a loss that cannot be right,
gradients of zero.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.errors import TrainingError

_log = logging.getLogger(__name__)
FAR = 1.5
ZEROS = 10


class Watch:
    """Looks at the figures of each step, in order.

    Args:
        leaves: the names of the trainable leaves, in the order of `jax.tree.leaves`.
        most_skipped: how many steps in a row may be skipped, less one.
        chance: the loss of a guess, `ln(classes)` or `ln(vocabulary)`; None where there is none.
    """

    def __init__(self, leaves: Sequence[str], most_skipped: int, chance: float | None) -> None:
        self._leaves, self._most, self._chance = leaves, most_skipped, chance
        self._skipped: list[_Skipped] = []
        self._zeros = 0

    def see(self, step: int, rows: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Take the figures of a step; return those that are to be written.

        Args:
            step: its number, from 1.
            rows: names its rows.
            metrics: what the step gave: `loss`, `grad_norm`, `weight` and `broken`.
        """
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [
                name
                for name, flag in zip(self._leaves, np.asarray(metrics["broken"]), strict=True)
                if flag
            ]
            skipped = _Skipped(step, rows, f"loss is {loss}, gradient norm is {norm}", bad)
            _log.warning("step %d is skipped: %s", step, skipped.what)
            self._skipped.append(skipped)
            return {"skipped": 1}
        self._skipped.clear()
        if float(metrics["weight"]) == 0:
            _log.warning(
                "step %d: no label in its batch (%s); nothing is learned from it", step, rows
            )
            return {"empty": 1, "loss": loss, "grad_norm": norm}
        if step == 1 and self._chance is not None and loss > FAR * self._chance:
            _log.warning(
                "step 1: loss %.2f is far above that of a guess, %.2f: likely another tokenizer or"
                " chat template than the model's, or damaged weights; look at `python -m"
                " jaxpeft.data --config ...`",
                loss,
                self._chance,
            )
        self._zeros = self._zeros + 1 if norm == 0 else 0
        if self._zeros == ZEROS:
            _log.warning(
                "step %d: the gradient was exactly 0 for %d steps: nothing is learned; likely no"
                " label is learned (look at `python -m jaxpeft.data --config ...`), or the loss"
                " does not depend on %s",
                step,
                ZEROS,
                self._leaves[0],
            )
        return {"loss": loss, "grad_norm": norm}

    def stop_if_too_many(self, newest: Callable[[], str]) -> None:
        """Stop the run where too many steps in a row were not finite: the program has applied none
        of them.

        Args:
            newest: names the newest checkpoint, if it is asked.

        Raises:
            TrainingError: naming the first of them, its rows and the leaves.
        """
        if len(self._skipped) < self._most:
            return
        first, last = self._skipped[0], self._skipped[-1]
        leaves = f"{', '.join(last.leaves[:3])}{' and others' if len(last.leaves) > 3 else ''}"
        raise TrainingError(
            f"step {last.step}: {last.what}, the last of {len(self._skipped)} steps in a row that"
            f" were skipped, the first of them step {first.step} ({first.rows}); not finite:"
            f" {leaves}; {newest()}; lower optimizer.learning_rate, set optimizer.clip_norm, or"
            " look at the rows"
        )


@dataclass(frozen=True)
class _Skipped:
    """A step that was skipped: its number and rows, what was wrong, and with which leaves."""

    step: int
    rows: str
    what: str
    leaves: list[str]
