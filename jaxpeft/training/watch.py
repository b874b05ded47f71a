"""What is watched while a run goes on: steps that are skipped, a loss that cannot be right, gradients of zero."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
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
        self._skipped: list[tuple[int, str]] = []
        self._zeros = 0

    def see(self, step: int, rows: str, metrics: Mapping[str, Any], newest: Callable[[], str]) -> dict[str, float]:
        """Takes the figures of a step; gives those that are to be written.

        Args:
            step: its number, from 1.
            rows: names its rows.
            metrics: what the step gave: `loss`, `grad_norm`, `weight` and `broken`.
            newest: names the newest checkpoint, if it is asked.

        Raises:
            TrainingError: too many steps in a row were skipped.
        """
        loss, norm = float(metrics["loss"]), float(metrics["grad_norm"])
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._skip(step, rows, f"loss is {loss}, gradient norm is {norm}", np.asarray(metrics["broken"]), newest)
            return {"skipped": 1}
        self._skipped.clear()
        if float(metrics["weight"]) == 0:
            _log.warning("step %d: no label in its batch (%s); nothing is learned from it", step, rows)
            return {"empty": 1, "loss": loss, "grad_norm": norm}
        if step == 1 and self._chance is not None and loss > FAR * self._chance:
            _log.warning(
                "step 1: loss %.2f is far above that of a guess, %.2f: likely another tokenizer or chat template than the "
                "model's, or damaged weights; look at `python -m jaxpeft.data --config ...`", loss, self._chance,
            )  # fmt: skip
        self._zeros = self._zeros + 1 if norm == 0 else 0
        if self._zeros == ZEROS:
            _log.warning(
                "step %d: the gradient was exactly 0 for %d steps: nothing is learned; likely no label is learned (look at "
                "`python -m jaxpeft.data --config ...`), or the loss does not depend on %s", step, ZEROS, self._leaves[0],
            )  # fmt: skip
        return {"loss": loss, "grad_norm": norm}

    def _skip(self, step: int, rows: str, what: str, broken: np.ndarray[Any, Any], newest: Callable[[], str]) -> None:
        """Counts a step whose loss or gradient is not finite: the program has not applied it."""
        self._skipped.append((step, rows))
        if len(self._skipped) < self._most:
            _log.warning("step %d is skipped: %s", step, what)
            return
        bad = [name for name, flag in zip(self._leaves, broken, strict=True) if flag]
        first, of = self._skipped[0]
        raise TrainingError(
            f"step {step}: {what}, the last of {len(self._skipped)} steps in a row that were skipped, the first of them step "
            f"{first} ({of}); not finite: {', '.join(bad[:3])}{' and others' if len(bad) > 3 else ''}; {newest()}; lower "
            "optimizer.learning_rate, set optimizer.clip_norm, or look at the rows"
        )
