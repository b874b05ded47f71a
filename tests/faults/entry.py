"""The main job with a fault at a named point:
`python -m tests.faults.entry POINT:N -- ARGUMENTS OF jaxpeft.train`.

`POINT:N` is where, the Nth time: `after_arrays` (saved, no manifest yet), `in_save` (Orbax has
begun), `in_delete` (an old step's manifest is gone, its folder is not), `in_eval`, `in_compile`,
`in_step`. The fault is a kill, or what stands behind a second colon: `in_eval:1:term`; several
signals are parted by commas; `full` fills the disk.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from jaxpeft import logs


def _signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def _fill_disk() -> None:
    """Let no file grow beyond 2,000 bytes from now on."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))


FAULTS: dict[str, Callable[[], None]] = {
    "kill": _signal(signal.SIGKILL),
    "term": _signal(signal.SIGTERM),
    "int": _signal(signal.SIGINT),
    "full": _fill_disk,
}


def main(argv: list[str]) -> int:
    """Set the fault and runs the job."""
    at, arguments = argv[0], argv[argv.index("--") + 1 :]
    point, number, *kind = at.split(":")
    # Orbax, imported before the command has set up logging, would do so itself
    logging.basicConfig(
        level=logging.WARNING, format="%(message)s", handlers=[logs.StderrHandler()]
    )
    from jaxpeft.checkpoint import manager, manifest
    from jaxpeft.train import evaluator, loop

    count = [0]
    kinds = (kind[0] if kind else "kill").split(",")

    def fault() -> None:
        count[0] += 1
        if count[0] == int(number):
            for name in kinds:
                FAULTS[name]()

    def before(owner: Any, name: str) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def replaced(*args: Any, **options: Any) -> Any:
            fault()
            return real(*args, **options)

        setattr(owner, name, replaced)

    points: dict[str, Callable[[], None]] = {
        "after_arrays": lambda: before(manifest, "write"),
        "in_save": lambda: before(manager.ocp.CheckpointManager, "save"),
        "in_delete": lambda: before(manager.shutil, "rmtree"),
        "in_eval": lambda: before(evaluator.Evaluator, "__call__"),
        "in_compile": lambda: before(loop, "_abstract_batch"),
        "in_step": lambda: before(loop, "put_batch"),
    }
    points[point]()
    from jaxpeft.train.__main__ import main as train

    return train(arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
