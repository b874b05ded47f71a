"""Compare methods: `python -m jaxpeft.compare --config configs/NAME.py [--workdir DIR]`.

Override config options by name: `--config.train.steps=100`. Trains the candidates of
`config.compare` on the same rows, steps and seeds, each run in its own process, and writes
`comparison.html`, `comparison.md`, `comparison.json` and `comparison.png` (metric over trainable
parameters) to the comparison's folder. The same command resumes a stopped comparison and skips
finished runs. Exit codes: 0 done, 1 a run has failed, 2 bad input, 143 stopped by SIGTERM, 130
stopped by SIGINT.
"""

from __future__ import annotations

import logging
import sys

from jaxpeft.errors import ConfigError
from jaxpeft.train.arguments import Job, RunArguments, find_process, run_job

ARGUMENTS = RunArguments


def main(argv: list[str]) -> int:
    """Run the comparison; return the exit code."""
    return run_job(argv, __doc__, _run, compares=True)


def _run(job: Job) -> int:
    from jaxpeft.compare import runs
    from jaxpeft.processes.signals import Stopped, StopRequest

    log = logging.getLogger("jaxpeft")
    place, _ = find_process(job.arguments)
    if place is not None and place.processes != 1:
        raise ConfigError(
            f"python -m jaxpeft.compare: was started as one of several processes ({place.by}), but"
            " starts the process of each run itself; start it once, or set JAXPEFT_DISTRIBUTED=off"
        )
    with StopRequest() as stop:
        try:
            failed = runs.run(
                job.config, job.workdir, stop, job.allowed, traceback=job.arguments.traceback
            )
        except Stopped as stopped:
            log.info("stopped on request; the same command resumes the comparison")
            return stopped.exit_code
    if failed:
        log.error("%s", runs.describe_failures(failed, job.workdir))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
