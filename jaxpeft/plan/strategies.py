"""Make a plan: compile every strategy, and find changes for those that do not fit."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft import chips
from jaxpeft.config.schema import Config
from jaxpeft.core import tree
from jaxpeft.errors import ConfigError
from jaxpeft.plan import changes, topology
from jaxpeft.plan.examine import Setting, examine, stack_where_possible
from jaxpeft.plan.report import Plan
from jaxpeft.plan.subject import described_in_json, model_config, with_changes
from jaxpeft.plan.topology import Topology

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlanRequest:
    """Request for a plan.

    Attributes:
        path: path of the config file.
        config: checked config.
        topology: devices to plan for.
        strategies: strategies to plan for; empty for the config's.
        hbm: GiB per device that a step may use; None for the chip's memory.
        model_config: a `config.json`, or the name of a shape; None for the config's model.
        scan: whether to scan layers.
        tries: maximum number of changes to compile for a strategy that does not fit.
    """

    path: str
    config: Config
    topology: Topology
    strategies: tuple[str, ...] = ()
    hbm: float | None = None
    model_config: str | None = None
    scan: bool = True
    tries: int = 2


def plan_strategies(request: PlanRequest) -> Plan:
    """Make a plan; call `topology.prepare` first.

    Raises:
        JaxpeftError: an input is invalid.
    """
    began, cpu_began = time.perf_counter(), time.process_time()
    config = request.config
    described = model_config(config.model.path, config.model.revision, request.model_config)
    limit = chips.usable(request.topology.chip, request.hbm)
    if request.hbm is not None and limit is not None and limit < request.hbm * chips.GIB:
        _log.warning(
            "--hbm %g: programs on a %s can use at most %.2f GiB",
            request.hbm,
            request.topology.chip.name,
            limit / chips.GIB,
        )
    where = topology.devices(request.topology)
    setting = Setting(described, request.topology, where, limit, request.scan)
    rows: list[Any] = []
    for strategy in request.strategies or (None,):
        own = config if strategy is None else with_changes(config, mesh__strategy=strategy)
        own = (
            with_changes(own, mesh__slices=request.topology.slices)
            if request.topology.slices > 1
            else own
        )
        _log.info("%s ...", strategy or config.mesh.strategy or "the config's mesh")
        found = examine(setting, own)
        _log.info("  %s (%.0f s)", found.row.verdict, found.row.seconds)
        rows.append(changes.add_nearest(setting, found, request.tries))
    if all(row.memory is None and row.nearest is None for row in rows):
        raise ConfigError(
            list(dict.fromkeys(row.verdict.removeprefix("refused: ") for row in rows))
        )
    run, _ = stack_where_possible(setting, config, "xla", "full")
    return Plan(
        config=request.path,
        model=described_in_json(described),
        method=config.method.name,
        parameters=tree.count(run.base),
        trained=tree.count(run.state.trainable),
        topology=request.topology.name,
        devices=request.topology.size,
        chip=dataclasses.asdict(request.topology.chip),
        length=config.data.max_length,
        layers="scanned" if run.model.options.scan_layers else "unrolled",
        programs=_programs(request.topology),
        seconds=round(time.perf_counter() - began, 1),
        cpu_seconds=round(time.process_time() - cpu_began, 1),
        versions=_versions(
            ("jax", "libtpu") if request.topology.chip.platform == "tpu" else ("jax",)
        ),
        rows=changes.summary(rows),
    )


def _programs(where: Topology) -> str:
    if where.chip.platform == "tpu":
        return f"compiled by libtpu for {where.chip.kind}"
    if where.chip.platform == "cpu":
        return f"compiled for {where.size} simulated CPU devices"
    return (
        "no GPU is used: memory is estimated; FLOPs and collectives are those of programs compiled"
        f" for {where.size} simulated CPU devices, whose attention materializes its scores"
    )


def _versions(names: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
