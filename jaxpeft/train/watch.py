"""Monitor a run for skipped steps, an implausible initial loss and zero gradients."""

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
    """Checks the metrics of each step, in order.

    Args:
        leaves: names of the trainable leaves, in the order of `jax.tree.leaves`.
        most_skipped: number of skipped steps in a row that ends the run.
        chance: loss of a uniform guess, `ln(classes)` or `ln(vocabulary)`; None if not defined.
    """

    def __init__(self, leaves: Sequence[str], most_skipped: int, chance: float | None) -> None:
        self._leaves, self._most, self._chance = leaves, most_skipped, chance
        self._skipped: list[_Skipped] = []
        self._zeros = 0

    def see(self, step: int, rows: str, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Check the metrics of a step; return those to write.

        Args:
            step: number of the step, from 1.
            rows: description of its rows.
            metrics: `loss`, `grad_norm`, `weight` and `broken` of the step.
        """
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            bad = [
                name
                for name, flag in zip(self._leaves, np.asarray(metrics["broken"]), strict=True)
                if flag
            ]
            skipped = _Skipped(step, rows, f"loss is {loss}, gradient norm is {norm}", bad)
            _log.warning("step %d was skipped: %s", step, skipped.what)
            self._skipped.append(skipped)
            return {"skipped": 1}
        self._skipped.clear()
        if float(metrics["weight"]) == 0:
            _log.warning("step %d: its batch (%s) has no labels, so it trains nothing", step, rows)
            return {"empty": 1, "loss": loss, "grad_norm": norm}
        if step == 1 and self._chance is not None and loss > FAR * self._chance:
            _log.warning(
                "step 1: loss %.2f is far above that of a uniform guess, %.2f: the tokenizer or"
                " chat template may not match the model, or the weights may be damaged; check the"
                " rows with `python -m jaxpeft.data --config ...`",
                loss,
                self._chance,
            )
        self._zeros = self._zeros + 1 if norm == 0 else 0
        if self._zeros == ZEROS:
            _log.warning(
                "step %d: the gradient was exactly 0 for %d steps: either the loss mask is empty"
                " (check with `python -m jaxpeft.data --config ...`), or the loss does not depend"
                " on %s",
                step,
                ZEROS,
                self._leaves[0],
            )
        return {"loss": loss, "grad_norm": norm}

    def stop_if_too_many(self, newest: Callable[[], str]) -> None:
        """Stop the run if too many steps in a row were not finite and therefore skipped.

        Args:
            newest: returns a description of the newest checkpoint.

        Raises:
            TrainingError: names the first skipped step, its rows and the leaves.
        """
        if len(self._skipped) < self._most:
            return
        first, last = self._skipped[0], self._skipped[-1]
        leaves = f"{', '.join(last.leaves[:3])}{' and others' if len(last.leaves) > 3 else ''}"
        raise TrainingError(
            f"step {last.step}: {last.what}; skipped {len(self._skipped)} steps in a row, starting"
            f" at step {first.step} ({first.rows}); not finite: {leaves}; {newest()}; lower"
            " optimizer.learning_rate, set optimizer.clip_norm, or check the rows"
        )


@dataclass(frozen=True)
class _Skipped:
    """A skipped step: its number, rows, problem and non-finite leaves."""

    step: int
    rows: str
    what: str
    leaves: list[str]
