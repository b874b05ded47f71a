"""Fine-tune a model: `python -m jaxpeft.train --config configs/NAME.py [--workdir DIR]`.

Override config options by name: `--config.method.rank=16`. The same command resumes a stopped run.
Exit codes: 0 done, 2 bad input, 143 stopped by SIGTERM and saved, 130 stopped by SIGINT and saved,
1 any other failure. Multi-process runs are set up by flags or environment variables
(docs/distributed.md); if one process is lost, the others exit with a different code.
"""

from __future__ import annotations

import logging
import sys

from jaxpeft.train.arguments import Job, RunArguments, find_process, run_job

ARGUMENTS = RunArguments


def main(argv: list[str]) -> int:
    """Run the job; return the exit code."""
    return run_job(argv, __doc__, _run)


def _run(job: Job) -> int:
    """Import JAX after the config is checked, connect to the other processes, and run."""
    from jaxpeft.processes.signals import NOTHING_NEW, Stopped, StopRequest

    place, waits = find_process(job.arguments)
    with StopRequest() as stop:
        from jax.experimental.multihost_utils import reached_preemption_sync_point

        from jaxpeft.processes import distributed
        from jaxpeft.train import cpu
        from jaxpeft.train.job import run

        peers = distributed.start(place, waits)
        cpu.keep_memory()
        if peers.client is not None:
            stop.agree(reached_preemption_sync_point)

        def body() -> int:
            try:
                stop.raise_if_requested()
                run(job.config, job.workdir, stop, job.allowed, peers)
            except Stopped as stopped:
                if not stopped.saved:
                    logging.getLogger("jaxpeft").info(NOTHING_NEW)
                return stopped.exit_code
            return 0

        return distributed.end_together(peers, waits, body, show_traceback=job.arguments.traceback)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
