"""`python -m jaxpeft.plan --config configs/NAME.py --topology v5e:4x4 [--strategies all] [--config.SECTION.OPTION=VALUE ...]`.

Says whether a run fits, and how fast it could be, before it runs: its training step is compiled for devices that are not there, and
no weight and no row is read. Needs no accelerator; TPU programs are compiled by libtpu (`pip install 'jaxpeft[plan]'`).
Exit codes: 0 a strategy fits (or no limit is known), 3 none does, 2 bad input, 1 any other failure.
"""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

from absl import flags

from jaxpeft import config as configs
from jaxpeft.command import guarded, set_up_logging, split_overrides
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.planning import topology
from jaxpeft.planning.shapes import SHAPES
from jaxpeft.sharding.sizes import STRATEGIES

NONE_FITS = 3
FLAGS = flags.FlagValues()
flags.DEFINE_string("config", None, "the config file; its options are set by --config.SECTION.OPTION=VALUE", flag_values=FLAGS)  # fmt: skip
flags.DEFINE_string("topology", None, f"the devices: {topology.EXAMPLES}", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "so many of them, joined by a slower network", flag_values=FLAGS)
flags.DEFINE_list(
    "strategies",
    None,
    f"all, or some of {', '.join(STRATEGIES)}; by default that of the config, all if it names none",
    flag_values=FLAGS,
)
flags.DEFINE_float("hbm", None, "GiB of a device that a step may take; by default what the chip has", lower_bound=0.01, flag_values=FLAGS)  # fmt: skip
flags.DEFINE_string(
    "model_config",
    None,
    f"--model-config: a config.json to plan for in place of the model's, or one of {', '.join(SHAPES)}",
    flag_values=FLAGS,
)
flags.DEFINE_bool("unrolled", False, "compile every layer by itself, as long runs do: takes many times as long", flag_values=FLAGS)  # fmt: skip
flags.DEFINE_integer("tries", 2, "changes that are compiled at most where a strategy does not fit", lower_bound=0, flag_values=FLAGS)  # fmt: skip
flags.DEFINE_string("json", None, "write the plan to this file too, as JSON", flag_values=FLAGS)
flags.DEFINE_string("plot", None, "draw memory over strategies to this file, a PNG", flag_values=FLAGS)
flags.DEFINE_bool("traceback", False, "show Python's traceback of an error", flag_values=FLAGS)


def parse_arguments(argv: list[str]) -> tuple[configs.Config, topology.Topology, tuple[str, ...]]:
    """Reads the command line and the config file, without importing JAX.

    Returns:
        `(config, devices, strategies)`; no strategy for that of the config.

    Raises:
        ConfigError: listing every problem.
    """
    FLAGS.unparse_flags()
    overrides, rest = split_overrides(argv)
    rest = [re.sub(r"^--?model-config(?==|$)", "--model_config", word) for word in rest]
    try:
        left = FLAGS(["jaxpeft.plan", *rest])[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    problems = [f"{left[0]!r}: not an option; see --help"] if left else []
    config, where = None, None
    if FLAGS.config is None:
        problems.append("--config: is not given; try --config configs/llama3_8b_lora.py")
    if FLAGS.topology is None:
        problems.append(f"--topology: is not given; write {topology.EXAMPLES}")
    try:
        config = configs.load(FLAGS.config, overrides) if FLAGS.config else None
    except ConfigError as error:
        problems += error.problems
    try:
        where = topology.read(FLAGS.topology, FLAGS.slices) if FLAGS.topology else None
    except ConfigError as error:
        problems += error.problems
    strategies = _strategies(FLAGS.strategies, config, problems)
    if FLAGS.hbm is not None and not math.isfinite(FLAGS.hbm):
        problems.append(f"--hbm: must be a number of GiB, is {FLAGS.hbm}")
    problems += [why for flag in ("json", "plot") if (why := _unwritable(flag, FLAGS[flag].value))]
    if problems or config is None or where is None:
        raise ConfigError(problems)
    return config, where, strategies


def _unwritable(flag: str, path: str | None) -> str | None:
    """Says why a plan could not be written to a file, as a plan takes minutes."""
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


def _strategies(asked: list[str] | None, config: configs.Config | None, problems: list[str]) -> tuple[str, ...]:
    if asked is None:
        own = config is not None and (config.mesh.strategy is not None or config.mesh.rules)
        return () if own else tuple(STRATEGIES)
    if not asked:
        problems.append(f"--strategies: is empty; leave it out, or name some of all, {', '.join(STRATEGIES)}")
    for name in asked:
        if name != "all" and name not in STRATEGIES:
            problems.append(
                f"--strategies: {name!r} is none{nearest(name, STRATEGIES)} (known: all, {', '.join(STRATEGIES)})"
            )
    return tuple(STRATEGIES) if "all" in asked else tuple(dict.fromkeys(asked))


def main(argv: list[str]) -> int:
    """Makes the plan and writes it out; gives the exit code."""
    set_up_logging(hushed="--traceback" not in argv)
    if {"--help", "-h", "-help"} & set(argv):
        sys.stdout.write(f"{__doc__}\n{FLAGS.module_help(FLAGS.find_module_defining_flag('config'))}")
        return 0
    return guarded(lambda: _run(*parse_arguments(argv)), show_traceback="--traceback" in argv)


def _run(config: configs.Config, where: topology.Topology, strategies: tuple[str, ...]) -> int:
    """Prepares the environment, and only then imports JAX."""
    topology.prepare(where)
    # what a mesh is stands in the table
    logging.getLogger("jaxpeft.sharding").setLevel(logging.ERROR)
    from jaxpeft.planning import making, report

    request = making.Request(
        FLAGS.config, config, where, strategies, FLAGS.hbm, FLAGS.model_config, not FLAGS.unrolled, FLAGS.tries
    )
    plan = making.make(request)
    sys.stdout.write(report.as_table(plan))
    write(plan, FLAGS.json, FLAGS.plot)
    return 0 if plan.best is not None else NONE_FITS


def write(plan: Any, json_path: str | None, plot_path: str | None) -> None:
    """Writes a plan to the files that are asked for.

    Args:
        plan: a `jaxpeft.planning.report.Plan`.
        json_path: None for none.
        plot_path: None for none.
    """
    from jaxpeft.planning import plot, report

    if json_path is not None:
        Path(json_path).write_text(json.dumps(report.as_json(plan), indent=2) + "\n")
    if plot_path is not None:
        plot.draw(Path(plot_path), plan)
    for path in (json_path, plot_path):
        if path is not None:
            logging.getLogger("jaxpeft").info("wrote %s", path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
