"""What SkyPilot itself makes of a task file, as JSON; run by the interpreter of an environment that
has SkyPilot.

python tests/launch/sky_task.py launch/skypilot.yaml [NAME=VALUE ...]
"""

from __future__ import annotations

import json
import sys

import sky


def main(path: str, *variables: str) -> None:
    task = sky.Task.from_yaml(path)
    task.update_envs(dict(one.split("=", 1) for one in variables))
    (resources,) = task.resources
    json.dump(
        {
            "accelerators": resources.accelerators,
            "use_spot": resources.use_spot,
            "job_recovery": resources.job_recovery,
            "num_nodes": task.num_nodes,
            "envs": task.envs,
            "secrets": sorted(task.secrets),
            "mounts": {
                place: [store.name, store.mode.value]
                for place, store in task.storage_mounts.items()
            },
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
