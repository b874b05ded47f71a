"""Plan a run: `python -m jaxpeft.plan --config configs/NAME.py --topology v5e:4x4`.

Options of the config are set by name: `--config.mesh.fsdp=8`. Says whether a run fits, and how fast
it could be, before it runs: compiles its training step for devices that are not there, and reads no
weight and no row. Needs no accelerator; libtpu compiles TPU programs (`pip install
'jaxpeft[plan]'`). Exit codes: 0 a strategy fits (or no limit is known), 3 none does, 2 bad input, 1
any other failure.
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.command.parser import ConfigArguments, Overrides
from jaxpeft.command.running import load_config, run_command
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

    topology: str | None = option(None, f"the devices: {topologies.EXAMPLES}")
    slices: int = option(1, "so many of them, joined by a slower network")
    strategies: tuple[str, ...] | None = option(
        None,
        f"all, or some of {', '.join(STRATEGIES)}; by default that of the config, all if it names"
        " none",
    )
    hbm: float | None = option(
        None, "GiB of a device that a step may take; by default what the chip has", at_least=0.01
    )
    model_config: str | None = option(
        None, f"a config.json to plan for in place of the model's, or one of {', '.join(SHAPES)}"
    )
    unrolled: bool = option(
        False, "compile every layer by itself, as long runs do: takes many times as long"
    )
    tries: int = option(
        2, "changes that are compiled at most where a strategy does not fit", at_least=0
    )
    json: str | None = option(None, "write the plan to this file too, as JSON")
    plot: str | None = option(None, "draw memory over strategies to this file, a PNG")


@dataclass(frozen=True)
class PlanJob:
    """What a command line asks for.

    Attributes:
        arguments: of the command.
        config: checked, the overrides applied.
        topology: the devices.
        strategies: to plan for; empty for that of the config.
    """

    arguments: PlanArguments
    config: Config
    topology: topologies.Topology
    strategies: tuple[str, ...]


def job_of(given: PlanArguments, overrides: Overrides = ()) -> PlanJob:
    """Read the config and the devices that a command line names, without importing JAX.

    Raises:
        ConfigError: listing every problem.
    """
    problems: list[str] = []
    config, where = None, None
    try:
        config = load_config(given, overrides, "configs/llama3_8b_lora.py")
    except ConfigError as error:
        problems += error.problems
    try:
        if given.topology is None:
            raise ConfigError(f"--topology: is not given; write {topologies.EXAMPLES}")
        where = topologies.read(given.topology, given.slices)
    except ConfigError as error:
        problems += error.problems
    strategies = _strategies(given.strategies, config, problems)
    files = {"json": given.json, "plot": given.plot}
    problems += [why for flag, path in files.items() if (why := _unwritable(flag, path))]
    if problems or config is None or where is None:
        raise ConfigError(problems)
    return PlanJob(given, config, where, strategies)


def _unwritable(flag: str, path: str | None) -> str | None:
    """Return why a plan could not be written to a file, as a plan takes minutes; None where it
    could.
    """
    if path is None:
        return None
    file = Path(path).absolute()
    if not file.parent.is_dir():
        return f"--{flag}: {path}: its folder does not exist; make it, or give another"
    if file.is_dir():
        return f"--{flag}: {path}: is a folder; give a file in it"
    if flag == "plot" and file.suffix != ".png":
        return f"--plot: {path}: is drawn as a PNG; let its name end in .png"
    new = not file.exists()
    try:
        file.open("ab").close()
    except OSError as error:
        return f"--{flag}: {path}: cannot be written ({error.strerror}); give another"
    if new:
        file.unlink()
    return None


def _strategies(
    asked: tuple[str, ...] | None, config: Config | None, problems: list[str]
) -> tuple[str, ...]:
    if asked is None:
        own = config is not None and (config.mesh.strategy is not None or config.mesh.rules)
        return () if own else tuple(STRATEGIES)
    if not asked:
        problems.append(
            f"--strategies: is empty; leave it out, or name some of all, {', '.join(STRATEGIES)}"
        )
    for name in asked:
        if name != "all" and name not in STRATEGIES:
            problems.append(
                f"--strategies: {name!r} is none{nearest(name, STRATEGIES)} (known: all,"
                f" {', '.join(STRATEGIES)})"
            )
    return tuple(STRATEGIES) if "all" in asked else tuple(dict.fromkeys(asked))


ARGUMENTS = PlanArguments


def main(argv: list[str]) -> int:
    """Make the plan and write it out; return the exit code."""
    return run_command(
        PlanArguments, argv, __doc__, lambda given, overrides: _run(job_of(given, overrides))
    )


def _run(job: PlanJob) -> int:
    """Prepare the environment, and only then import JAX."""
    topologies.prepare(job.topology)
    # what a mesh is stands in the table
    logging.getLogger("jaxpeft.sharding").setLevel(logging.ERROR)
    from jaxpeft.plan import report
    from jaxpeft.plan.strategies import PlanRequest, plan_strategies

    given = job.arguments
    request = PlanRequest(
        str(given.config),
        job.config,
        job.topology,
        job.strategies,
        given.hbm,
        given.model_config,
        not given.unrolled,
        given.tries,
    )
    plan = plan_strategies(request)
    sys.stdout.write(report.as_table(plan))
    write(plan, given.json, given.plot)
    return 0 if plan.best is not None else NONE_FITS


def write(plan: Any, json_path: str | None, plot_path: str | None) -> None:
    """Write a plan to the files that are asked for.

    Args:
        plan: a `jaxpeft.plan.report.Plan`.
        json_path: None for none.
        plot_path: None for none.
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
