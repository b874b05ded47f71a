"""`python -m jaxpeft.train --config configs/NAME.py [--config.method.rank=16 ...] [--workdir DIR]`: the main job.

The same command again goes on where it was stopped. Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM and saved,
130 stopped by SIGINT and saved, 1 any other failure.
"""

from __future__ import annotations

import logging
import re
import sys
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path

from absl import flags

from jaxpeft import config as configs
from jaxpeft import logs, names
from jaxpeft.command import guarded, split_overrides
from jaxpeft.errors import ConfigError

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
flags.DEFINE_bool("validate", False, "check the config and stop", flag_values=FLAGS)


def parse_arguments(argv: list[str]) -> tuple[configs.Config, Path, str]:
    """Reads the command line and the config file, without importing JAX.

    Args:
        argv: the arguments, without the program's name.

    Returns:
        `(config, workdir, path of the config file)`.

    Raises:
        ConfigError: listing every problem.
    """
    FLAGS.unparse_flags()
    FLAGS.set_default("allow_change", [])
    overrides, rest = split_overrides(argv)
    rest = [re.sub("^--?allow-change", "--allow_change", word) for word in rest]
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
    if problems or config is None:
        raise ConfigError(problems)
    return config, workdir, FLAGS.config


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
            f"--workdir {names.shown(str(workdir))}: cannot be written ({why}); give another folder"
        ) from None


def main(argv: list[str]) -> int:
    """Runs the job; gives the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()])
    logging.getLogger("jaxpeft").setLevel(logging.INFO)
    if "--traceback" not in argv:
        _hush()
    if {"--help", "-h", "-help"} & set(argv):
        sys.stdout.write(f"{__doc__}\n{FLAGS.main_module_help()}")
        return 0
    return guarded(lambda: _checked(argv), show_traceback="--traceback" in argv)


def _checked(argv: list[str]) -> int:
    config, workdir, path = parse_arguments(argv)
    if FLAGS.validate:
        logging.getLogger("jaxpeft").info("%s is valid", path)
        return 0
    return _run(config, workdir, FLAGS.allow_change)


def _hush() -> None:
    """Silences what the threads of a failed save say: the error comes back to us, and is told once."""
    for name in ("asyncio", "absl"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    usual = sys.unraisablehook

    def unraisable(what: sys.UnraisableHookArgs) -> None:
        # TensorStore's threads end after the loop that waited for them
        if str(what.exc_value) != "Event loop is closed":
            usual(what)

    sys.unraisablehook = unraisable
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _run(config: configs.Config, workdir: Path, allowed: list[str]) -> int:
    """Imports JAX, now that the config is good, and runs."""
    from jaxpeft.training.signals import Stopped, StopRequest

    with StopRequest() as stop:
        from jaxpeft.training.job import run

        try:
            stop.raise_if_requested()
            run(config, workdir, stop, allowed)
        except Stopped as stopped:
            return stopped.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
