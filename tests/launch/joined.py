"""A small program in place of the trainer: it joins the processes that launch/local.sh has started and computes over all of them.

python -m tests.launch.joined OUTPUT --coordinator HOST:PORT --processes N --process I
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int)
    given = parser.parse_args(argv)
    import jax
    import jax.numpy as jnp
    from jax.experimental import multihost_utils

    if given.coordinator:
        jax.distributed.initialize(given.coordinator, given.processes, given.process)
    total = multihost_utils.process_allgather(jnp.array([jax.process_index() + 1])).sum()
    if jax.process_index() == 0:
        said = {
            "processes": jax.process_count(),
            "local": jax.local_device_count(),
            "devices": jax.device_count(),
            "total": int(total),
        }
        given.output.write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
