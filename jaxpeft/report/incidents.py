"""What a reader of a run's page should know: skipped steps, missing files, no gain."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.evaluation.metrics import LOWER_IS_BETTER
from jaxpeft.report.run_folder import RunFolder
from jaxpeft.report.svg_charts import points_of

_MOST_LISTED = 8


def find_incidents(run: RunFolder, metric: str) -> list[str]:
    """Return the incidents of a run, one sentence each.

    Args:
        run: the run.
        metric: metric that selects the best step.
    """
    found = [*_in_steps(run), *_in_files(run)]
    result = run.result
    if result is None:
        return found
    if result.steps < run.start.steps:
        found.append(f"Training stopped early, after {result.steps} of {run.start.steps} steps.")
    before, after = run.before.get(metric), result.after.get(metric)
    if before is not None and after is not None:
        gain = before - after if metric in LOWER_IS_BETTER else after - before
        if gain <= 0:
            found.append(f"The {result.split} {metric} is not better than before training.")
    return found


def _in_steps(run: RunFolder) -> list[str]:
    kinds = (
        ("skipped, because the loss or a gradient was not finite", "skipped", 1),
        ("without labels, so that nothing was trained", "empty", 1),
        ("whose gradient was exactly 0", "grad_norm", 0),
    )
    found = [
        f"Steps {what}: {_list(steps)}."
        for what, key, value in kinds
        if (steps := [line["step"] for line in run.lines if line.get(key) == value])
    ]
    if run.lines and not points_of(run.lines, "loss"):
        found.append("No finite training loss is recorded.")
    return found


def _list(steps: Sequence[int]) -> str:
    """Return the first steps, and the number of others."""
    more = len(steps) - _MOST_LISTED
    return ", ".join(map(str, steps[:_MOST_LISTED])) + (f" and {more} more" if more > 0 else "")


def _in_files(run: RunFolder) -> list[str]:
    found: list[str] = []
    if run.damaged:
        found.append(f"Damaged lines of metrics.jsonl were moved to {run.damaged.name}.")
    if not run.lines:
        found.append("No metrics are recorded, so there are no curves.")
    if not run.start.environment:
        found.append(
            "run.json is missing, so versions, devices and row counts are unknown: the run is of an"
            " earlier version of jaxpeft, or the file was removed."
        )
    return found
