"""Find the smallest config change that makes a run fit, by compiling candidates."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.plan import estimates
from jaxpeft.plan.examine import Candidate, Setting, examine, prepare
from jaxpeft.plan.programs import gib
from jaxpeft.plan.report import Row
from jaxpeft.plan.step_arguments import step_arguments
from jaxpeft.plan.subject import with_changes
from jaxpeft.remat import stronger
from jaxpeft.sharding.sizes import divisors, row_shards


@dataclass(frozen=True)
class Change:
    """A config with a small change.

    Attributes:
        text: the change, as command-line options.
        config: the changed config.
    """

    text: str
    config: Config


def changes(config: Config, remat: str, over: int) -> Iterator[Change]:
    """Yield changes, smallest first: those that keep a run's numerics (remat, accumulation), then
    quantization, then smaller batches.

    Args:
        config: config that does not fit.
        remat: its remat policy.
        over: number of devices that rows are sharded over.
    """
    policies, parts = stronger(remat), _accumulations(config, over)
    same: list[dict[str, Any]] = [{"model__remat": policy} for policy in policies]
    same += [{"train__accumulation": n} for n in parts]
    if policies and parts:
        same.append({"model__remat": "full", "train__accumulation": parts[-1]})
    yield from (_change(config, one) for one in same)
    least: dict[str, Any] = {"model__remat": "full"} if policies else {}
    least |= {"train__accumulation": parts[-1]} if parts else {}
    for form in ("int8", "nf4") if config.model.quant == "none" else ():
        yield _change(config, {"model__quant": form})
        if least:
            yield _change(config, {"model__quant": form, **least})
    yield from (
        _change(config, {"train__batch_size": size, "train__accumulation": 1})
        for size in _smaller(config, over)
    )


def repairs(config: Config, over: int) -> Iterator[Change]:
    """Yield changes to a batch that cannot be sharded: less accumulation, then the next batch size.

    Args:
        config: rejected config.
        over: number of devices to shard rows over.
    """
    size, parts = config.train.batch_size, config.train.accumulation
    for n in reversed(divisors(size)):
        if n < parts and size % (n * over) == 0:
            yield _change(config, {"train__accumulation": n})
    rounded = -(-size // over) * over
    if rounded != size:
        yield _change(config, {"train__batch_size": rounded, "train__accumulation": 1})


def _accumulations(config: Config, over: int) -> list[int]:
    """Return possible accumulation steps above the config's, each at least twice the previous."""
    size, found = config.train.batch_size, [config.train.accumulation]
    for n in divisors(size):
        if size % (n * over) == 0 and n >= 2 * found[-1]:
            found.append(n)
    last = size // over
    if last > found[-1] and size % over == 0:
        found.append(last)
    return found[1:]


def _smaller(config: Config, over: int) -> list[int]:
    """Return smaller batch sizes that can be sharded, by repeated halving."""
    size, found = config.train.batch_size // 2, list[int]()
    while size >= over:
        if size % over == 0:
            found.append(size)
        size //= 2
    return found


def _change(config: Config, what: dict[str, Any]) -> Change:
    text = ", ".join(f"{key.replace('__', '.')} {value}" for key, value in what.items())
    return Change(text, with_changes(config, **what))


def add_nearest(setting: Setting, found: Candidate, most: int) -> Row:
    """Return the row of a candidate; if it does not fit, with the nearest change that does.

    Args:
        setting: setting shared by all candidates.
        found: examined candidate.
        most: maximum number of changes to compile.
    """
    row, tried = found.row, list[str]()
    if row.fits is not False:
        return row
    for change in _likely(setting, found, tried)[:most]:
        candidate = examine(setting, change.config, change.text)
        if candidate.row.fits is not False:
            return dataclasses.replace(row, nearest=candidate.row, tried=tuple(tried))
        tried.append(f"{change.text} ({candidate.row.verdict})")
    return dataclasses.replace(row, tried=tuple(tried))


def _likely(setting: Setting, found: Candidate, ruled_out: list[str]) -> list[Change]:
    """Return the changes estimated to fit, nearest first; if none is, add the reason to
    `ruled_out`.
    """
    row = found.row
    room, scale = setting.room or math.inf, 1.0
    if found.placed is None or found.kept is None or row.memory is None:
        over = _rows_over(setting, found.config)
        tried = [] if over is None else list(repairs(found.config, over))
    else:
        # ratio of the program's memory to its estimate
        measured = max(1, row.memory.total - found.placed.held)
        scale = measured / max(1, found.kept.total(row.remat))
        tried = list(changes(found.config, row.remat, row_shards(row.mesh)))
    sizes = [_predict(setting, change, scale) for change in tried]
    likely = [change for change, size in zip(tried, sizes, strict=True) if size <= room]
    least = min(sizes, default=math.inf)
    if not likely and least < math.inf:
        ruled_out.append(
            f"batch size, remat and quantization, which need at least about {gib(least)}"
        )
    return likely


def _rows_over(setting: Setting, config: Config) -> int | None:
    """Return the number of devices that rows are sharded over if only the batch size is rejected,
    else None.
    """
    any_size = setting.topology.size * config.train.accumulation
    try:
        mesh, _, _ = prepare(setting, with_changes(config, train__batch_size=any_size))
    except (ConfigError, TargetError):
        return None
    return row_shards(mesh.shape)


def _predict(setting: Setting, change: Change, scale: float) -> float:
    """Estimate the bytes of a change without compiling it."""
    try:
        mesh, run, _ = prepare(setting, change.config)
    except (ConfigError, TargetError):
        return math.inf
    placed = step_arguments(run, mesh)
    return placed.held + scale * estimates.estimate_kept(run, placed, mesh).total(
        run.model.options.remat
    )


def summary(rows: Sequence[Row]) -> tuple[Row, ...]:
    """Name the fastest fitting strategy in the verdict of each row that does not fit."""
    fitting = [row for row in rows if row.fits and row.memory is not None]
    if not fitting:
        return tuple(rows)
    best = min(fitting, key=lambda row: row.roofline.seconds if row.roofline else math.inf)
    return tuple(
        (
            dataclasses.replace(row, verdict=f"{row.verdict}; {best.strategy} fits")
            if row.fits is False
            else row
        )
        for row in rows
    )
