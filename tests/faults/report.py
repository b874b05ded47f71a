"""Runs the fault tests and writes docs/reliability.md from their results:
`python -m tests.faults.report`.

Further arguments go to pytest, such as `-n 2`.
"""

from __future__ import annotations

import os
import platform
import sys
from collections import defaultdict
from pathlib import Path

import jax
import pytest

from tests.faults.cases import CASES, MARKS

OUT = Path(__file__).parents[2] / "docs" / "reliability.md"
HEAD = """# Reliability

What happens to a run when something fails, and what jaxpeft promises then. Tests in `tests/faults` with the number of a
case show it. `python -m tests.faults.report` generates this page from their results.

The four marks: **C** the exit code is the promised one (0 done, 2 bad input: do not restart, 143 and 130 stopped by a
signal and saved, 1 any other failure), or the run recovers; **M** the message names field, value, file and fix, in at
most five lines, or in one line for each of several problems, and without a traceback; **T** in time: refused before
anything is compiled, within a minute; **L** nothing is lost: what was saved is there, byte for byte, and the resumed
run ends like an uninterrupted one.

"Bit-equal" means bit-equal on CPUs, including simulated devices: all of this page ran there. It does not hold on a GPU
yet: on an H200, two equal runs differ from the fourth step on, and a resumed run differs from an uninterrupted one. On
TPUs none of it has run.
"""


class Results:
    """A pytest plugin that gathers the marks of each case, by tests that passed and tests that
    failed.
    """

    def __init__(self) -> None:
        self.met: dict[int, set[str]] = defaultdict(set)
        self.tests: dict[int, int] = defaultdict(int)
        self.failed: dict[int, list[str]] = defaultdict(list)
        self.seconds = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's result."""
        self.seconds += report.duration
        cases = [int(str(value)) for name, value in report.user_properties if name == "case"]
        if report.failed:
            for case in cases:
                self.failed[case].append(report.nodeid)
        if report.when == "call":
            for case in cases:
                self.tests[case] += 1
                self.met[case] |= {
                    str(value) for name, value in report.user_properties if name == "mark"
                }

    def marks(self, case: int) -> list[bool]:
        """Return of each mark of a case whether a test shows it and none has failed."""
        return [mark in self.met[case] and not self.failed[case] for mark in MARKS]


def page(results: Results) -> str:
    """Write the page."""
    rows: list[str] = []
    for case, (what, promised) in CASES.items():
        told = " ".join(
            mark if met else "-" for mark, met in zip(MARKS, results.marks(case), strict=True)
        )
        rows.append(f"| {case} | {what} | {promised} | {told} | {results.tests[case]} |")
    met = sum(sum(results.marks(case)) for case in CASES)
    whole = sum(all(results.marks(case)) for case in CASES)
    ran = sum(results.tests[case] > 0 for case in CASES)
    score = (
        f"{whole} of {len(CASES)} cases with all four marks, {met} of {len(CASES) * len(MARKS)}"
        f" marks; {ran} cases run, by {sum(results.tests.values())} tests, on the CPU with jax"
        f" {jax.__version__}, Python {platform.python_version()}."
    )
    table = [
        "| case | what happens | what is promised | marks | tests |",
        "|---|---|---|---|---|",
        *rows,
    ]
    return "\n".join([HEAD, score, "", *table, ""])


def main(argv: list[str]) -> int:
    """Run the tests and write the page."""
    os.environ.setdefault("JAXPEFT_KILLS", "50")
    results = Results()
    code = pytest.main([str(Path(__file__).parent), "-q", *argv], plugins=[results])
    OUT.write_text(page(results))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
