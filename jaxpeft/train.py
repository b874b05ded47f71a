"""`python -m jaxpeft.train --config configs/NAME.py [--config.method.rank=16 ...] [--workdir DIR]`: the main job.

The same command again goes on where it was stopped. Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM and saved,
130 stopped by SIGINT and saved, 1 any other failure. As one of several processes (docs/distributed.md) it is found by flags or by
the environment; a process that is lost ends the others with a code that is none of these.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from absl import flags

from jaxpeft import clusters, names
from jaxpeft import config as configs
from jaxpeft.command import guarded, set_up_logging, split_overrides
from jaxpeft.errors import ConfigError, cut

Run = Callable[[configs.Config, Path, list[str]], int]
FLAGS = flags.FlagValues()
flags.DEFINE_string(
    "config", None, "the config file; its options are set by --config.SECTION.OPTION=VALUE", flag_values=FLAGS
)
flags.DEFINE_string("workdir", None, "folder of the run; runs/NAME_OF_THE_CONFIG by default", flag_values=FLAGS)
flags.DEFINE_string("name", None, "name of the run, in place of --workdir: its folder is runs/NAME", flag_values=FLAGS)
flags.DEFINE_bool("traceback", False, "show Python's traceback of an error", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "allow_change", [], "--allow-change=FIELD: go on though this field of the config has changed", flag_values=FLAGS
)
flags.DEFINE_bool("allow_base", False, "--allow-base: go on though the base has changed", flag_values=FLAGS)
flags.DEFINE_string("coordinator", None, "host:port of process 0, of a run of several processes", flag_values=FLAGS)
flags.DEFINE_integer("processes", None, "how many processes the run has", flag_values=FLAGS)
flags.DEFINE_integer("process", None, "which of them this is, from 0", flag_values=FLAGS)
flags.DEFINE_integer(
    "heartbeat_timeout", None, "seconds without a sign of life of a process until all end; 100 by default", flag_values=FLAGS
)  # fmt: skip
flags.DEFINE_bool("validate", False, "check the config and stop", flag_values=FLAGS)


def parse_arguments(argv: list[str], *, compares: bool = False) -> tuple[configs.Config, Path, str]:
    """Reads the command line and the config file, without importing JAX.

    Args:
        argv: the arguments, without the program's name.
        compares: whether the config must be that of a comparison; if not, it must not be.

    Returns:
        `(config, workdir, path of the config file)`.

    Raises:
        ConfigError: listing every problem.
    """
    FLAGS.unparse_flags()
    FLAGS.set_default("allow_change", [])
    overrides, rest = split_overrides(argv)
    rest = [re.sub("^--?allow-(change|base)", r"--allow_\1", word) for word in rest]
    try:
        left = FLAGS(["jaxpeft.train", *rest])[1:]
    except flags.Error as error:
        raise ConfigError(f"{error}; see --help") from error
    if left:
        raise ConfigError(f"{left[0]!r}: not an option; options are --config, --config.SECTION.OPTION and --workdir")
    if FLAGS.config is None:
        raise ConfigError("--config: is not given; try --config configs/quickstart.py")
    problems: list[str] = []
    config, workdir = None, Path("runs") / Path(FLAGS.config).stem
    try:
        workdir = _workdir(workdir)
    except ConfigError as error:
        problems += error.problems
    try:
        config = configs.load(FLAGS.config, overrides)
    except ConfigError as error:
        problems += error.problems
    if config is not None and bool(config.compare.candidates) != compares:
        problems.append(_OTHER_VERB[compares].format(count=len(config.compare.candidates), path=FLAGS.config))
    if problems or config is None:
        raise ConfigError(problems)
    return config, workdir, FLAGS.config


_OTHER_VERB = {
    False: "config.compare.candidates: {count} methods to compare; run `python -m jaxpeft.compare --config {path}`, or set "
    "--config.compare.candidates=() to train config.method alone",
    True: "config.compare.candidates: there is none to compare; list them, or run `python -m jaxpeft.train --config {path}`",
}


def _workdir(default: Path) -> Path:
    """Gives the folder of the run.

    Raises:
        ConfigError: it cannot be written, or made, or the name is none.
    """
    if FLAGS.name is not None and FLAGS.workdir is not None:
        raise ConfigError("--name: goes without --workdir; give one of them")
    workdir = Path(FLAGS.workdir or default)
    if FLAGS.name is not None:
        workdir = names.folder_named(default.parent, FLAGS.name)
    if FLAGS.validate:
        return workdir
    try:
        with suppress(FileNotFoundError):
            workdir.stat()
        there = next((folder for folder in (workdir, *workdir.absolute().parents) if folder.exists()), workdir)
        with tempfile.TemporaryFile(dir=there):
            names.require_no_way_out(workdir)
            return workdir
    except (OSError, ValueError) as error:  # a ValueError of a path with a NUL
        if isinstance(error, ConfigError):
            raise
        why = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--workdir {cut(str(workdir), 200)}: cannot be written ({why}); give another folder"
        ) from None


def main(argv: list[str]) -> int:
    """Runs the job; gives the exit code."""
    return verb(argv, __doc__, _run)


def verb(argv: list[str], about: str | None, run: Run, *, compares: bool = False) -> int:
    """Runs a command that takes a config; gives the exit code.

    Args:
        argv: the arguments, without the program's name.
        about: what `--help` says first.
        run: does the work, given the config, the folder of the run and the fields that may have changed.
        compares: whether the config must be that of a comparison.
    """
    set_up_logging(hushed="--traceback" not in argv)
    if {"--help", "-h", "-help"} & set(argv):
        sys.stdout.write(f"{about}\n{FLAGS.module_help(FLAGS.find_module_defining_flag('config'))}")
        return 0

    def checked() -> int:
        config, workdir, path = parse_arguments(argv, compares=compares)
        if FLAGS.validate:
            logging.getLogger("jaxpeft").info("%s is valid", path)
            return 0
        return run(config, workdir, FLAGS.allow_change + ["base"] * FLAGS.allow_base)

    return guarded(checked, show_traceback="--traceback" in argv)


def place_of_process() -> tuple[clusters.Place | None, clusters.Waits]:
    """Tells from flags and environment which process of how many this is, and how long it waits for the others.

    Raises:
        ConfigError: they are half set, or contradict each other.
    """
    given = clusters.Flags(FLAGS.coordinator, FLAGS.processes, FLAGS.process, FLAGS.heartbeat_timeout)
    return clusters.find(os.environ, given), clusters.waits(os.environ, given)


def _run(config: configs.Config, workdir: Path, allowed: list[str]) -> int:
    """Imports JAX, now that the config is good, joins the other processes, and runs."""
    from jaxpeft.training.signals import NOTHING_NEW, Stopped, StopRequest

    place, waits = place_of_process()
    with StopRequest() as stop:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        from jaxpeft import distributed
        from jaxpeft.training import cpu
        from jaxpeft.training.job import run

        peers = distributed.start(place, waits)
        cpu.keep_memory()
        if peers.client is not None:
            stop.agree(reached_preemption_sync_point)

        def body() -> int:
            try:
                stop.raise_if_requested()
                run(config, workdir, stop, allowed, peers)
            except Stopped as stopped:
                if not stopped.saved:
                    logging.getLogger("jaxpeft").info(NOTHING_NEW)
                return stopped.exit_code
            return 0

        return distributed.together(peers, waits, body, show_traceback=FLAGS.traceback)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
