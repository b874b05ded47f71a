"""What SkyPilot itself makes of nodes that end, as JSON; run by the interpreter of an environment
that has SkyPilot.

python tests/launch/sky_ends.py launch/skypilot.yaml '[[[2, 0], [1, 0]], ...]'

Each item is the nodes of a job that end, in the order in which they do: [number, exit code]. Each
gives the codes that SkyPilot notes for the job, and whether it starts the job again.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import sky
from sky.backends.task_codegen import RayCodeGen
from sky.jobs.recovery_strategy import StrategyExecutor


class Ray:
    """Stands in for Ray: a future is a node, and the nodes end in a given order."""

    def __init__(self, ends: list[list[int]]) -> None:
        self.codes = dict[int, int]((node, code) for node, code in ends)

    def wait(self, futures: list[int]) -> tuple[list[int], list[int]]:
        first = next(node for node in self.codes if node in futures)
        return [first], [node for node in futures if node != first]

    def get(self, node: int) -> dict[str, int]:
        return {"return_code": self.codes[node], "pid": node}

    def cancel(self, node: int, *, force: bool) -> None:
        pass


def noted(ends: list[list[int]]) -> list[int]:
    """Return the codes of a job, by the program that SkyPilot runs for it."""
    made = RayCodeGen()
    made.add_prologue(1)
    text = "\n".join(made._code)
    text = text[text.index("def get_or_fail") : text.index("futures = []")]
    given = {
        "ray": Ray(ends),
        "ray_util": SimpleNamespace(remove_placement_group=lambda _: None),
        "sys": sys,
    }
    exec("from typing import List\nCANCELLED_RETURN_CODE = 137\n" + text, given)
    codes, _ = given["get_or_fail"](sorted(node for node, _ in ends), None)
    return codes


def main(path: str, cases: str) -> None:
    (resources,) = sky.Task.from_yaml(path).resources
    recovery = resources.job_recovery
    found = []
    for ends in json.loads(cases):
        codes = noted(ends)
        executor = SimpleNamespace(
            recover_on_exit_codes=recovery["recover_on_exit_codes"],
            max_restarts_on_errors=recovery.get("max_restarts_on_errors", 0),
            restart_cnt_on_failure=0,
        )
        found.append(
            [codes, any(codes) and StrategyExecutor.should_restart_on_failure(executor, codes)]
        )
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
