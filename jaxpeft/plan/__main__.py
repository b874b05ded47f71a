"""Plan a run: `python -m jaxpeft.plan --config configs/NAME.py --topology v5e:4x4`.

Override config options by name: `--config.mesh.fsdp=8`. Predicts whether a run fits in memory and
how fast it can be: compiles its train step for absent devices, without reading weights or rows.
Needs no accelerator; libtpu compiles TPU programs (`pip install 'jaxpeft[plan]'`). Exit codes: 0 a
strategy fits (or no limit is known), 3 no strategy fits, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.command.output_paths import file_problem
from jaxpeft.command.parser import ConfigArguments, Overrides
from jaxpeft.command.running import load_config, run_command, write_lines
from jaxpeft.config import Config
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.plan import topology as topologies
from jaxpeft.plan.shapes import SHAPES
from jaxpeft.sharding.sizes import STRATEGIES

NONE_FITS = 3


@dataclass(frozen=True, kw_only=True)
class PlanArguments(ConfigArguments):
    """The arguments of `plan`."""

    topology: str | None = option(None, f"devices: {topologies.EXAMPLES}")
    slices: int = option(1, "number of slices, connected by a slower network")
    strategies: tuple[str, ...] | None = option(
        None,
        f"all, or some of {', '.join(STRATEGIES)}; default the config's, or all if it sets none",
    )
    hbm: float | None = option(
        None, "GiB of device memory a step may use; default the chip's memory", at_least=0.01
    )
    model_config: str | None = option(
        None, f"config.json to plan for instead of the model's, or one of {', '.join(SHAPES)}"
    )
    unrolled: bool = option(
        False, "compile with unrolled layers, as long runs do; much slower to compile"
    )
    tries: int = option(
        2, "maximum number of changes to compile if a strategy does not fit", at_least=0
    )
    json: str | None = option(None, "also write the plan to this file, as JSON")
    plot: str | None = option(None, "plot memory by strategy to this PNG file")


@dataclass(frozen=True)
class PlanJob:
    """A parsed command line.

    Attributes:
        arguments: command-line arguments.
        config: checked config with overrides applied.
        topology: devices to plan for.
        strategies: strategies to plan for; empty for the config's.
    """

    arguments: PlanArguments
    config: Config
    topology: topologies.Topology
    strategies: tuple[str, ...]


def job_of(arguments: PlanArguments, overrides: Overrides = ()) -> PlanJob:
    """Read the config and the topology of a command line, without importing JAX.

    Raises:
        ConfigError: lists every problem.
    """
    problems: list[str] = []
    config, where = None, None
    try:
        config = load_config(arguments, overrides, "configs/llama3_8b_lora.py")
    except ConfigError as error:
        problems += error.problems
    try:
        if arguments.topology is None:
            raise ConfigError(f"--topology: is not given; try {topologies.EXAMPLES}")
        where = topologies.read(arguments.topology, arguments.slices)
    except ConfigError as error:
        problems += error.problems
    strategies = _strategies(arguments.strategies, config, problems)
    files = {"json": arguments.json, "plot": arguments.plot}
    problems += [why for flag, path in files.items() if (why := _unwritable(flag, path))]
    if problems or config is None or where is None:
        raise ConfigError(problems)
    return PlanJob(arguments, config, where, strategies)


def _unwritable(flag: str, path: str | None) -> str | None:
    """Return the problem with an output file, or None; checked early, as a plan takes minutes."""
    if flag == "plot" and path is not None and Path(path).suffix != ".png":
        return f"--plot: {path}: must end in .png"
    return file_problem(f"--{flag}", path)


def _strategies(
    requested: tuple[str, ...] | None, config: Config | None, problems: list[str]
) -> tuple[str, ...]:
    if requested is None:
        own = config is not None and (config.mesh.strategy is not None or config.mesh.rules)
        return () if own else tuple(STRATEGIES)
    if not requested:
        problems.append(
            f"--strategies: is empty; omit it, or give some of all, {', '.join(STRATEGIES)}"
        )
    for name in requested:
        if name != "all" and name not in STRATEGIES:
            problems.append(
                f"--strategies: unknown strategy {name!r}{nearest(name, STRATEGIES)} (known: all,"
                f" {', '.join(STRATEGIES)})"
            )
    return tuple(STRATEGIES) if "all" in requested else tuple(dict.fromkeys(requested))


ARGUMENTS = PlanArguments


def main(argv: list[str]) -> int:
    """Make and write the plan; return the exit code."""
    return run_command(
        PlanArguments,
        argv,
        __doc__,
        lambda arguments, overrides: _run(job_of(arguments, overrides)),
    )


def _run(job: PlanJob) -> int:
    """Prepare the environment before importing JAX, and make the plan."""
    topologies.prepare(job.topology)
    # the table already shows the mesh
    logging.getLogger("jaxpeft.sharding").setLevel(logging.ERROR)
    from jaxpeft.plan import report
    from jaxpeft.plan.strategies import PlanRequest, plan_strategies

    arguments = job.arguments
    request = PlanRequest(
        str(arguments.config),
        job.config,
        job.topology,
        job.strategies,
        arguments.hbm,
        arguments.model_config,
        not arguments.unrolled,
        arguments.tries,
    )
    plan = plan_strategies(request)
    write_lines(report.as_table(plan).removesuffix("\n"))
    write(plan, arguments.json, arguments.plot)
    return 0 if plan.best is not None else NONE_FITS


def write(plan: Any, json_path: str | None, plot_path: str | None) -> None:
    """Write a plan to the requested files.

    Args:
        plan: a `jaxpeft.plan.report.Plan`.
        json_path: path of the JSON file, or None.
        plot_path: path of the PNG file, or None.
    """
    from jaxpeft.plan import plot, report

    if json_path is not None:
        Path(json_path).write_text(json.dumps(report.as_json(plan), indent=2) + "\n")
    if plot_path is not None:
        plot.draw(Path(plot_path), plan)
    for path in (json_path, plot_path):
        if path is not None:
            logging.getLogger("jaxpeft").info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
