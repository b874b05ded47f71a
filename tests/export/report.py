"""Exports every method to every target, and writes the tables of docs/export.md:
`python -m tests.export.report`.

Further arguments go to pytest. The second table needs `pip install -e '.[servers]'`.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import pytest

from jaxpeft.export.export_targets import TARGETS
from tests.export.making import FAMILIES
from tests.export.test_matrix import CASES, METHODS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "export.md"
HOLDS, MEASURED = "## What a target holds\n", "## Measured\n"
MATRIX = "it_is_exported_or_refused_with_a_target_that_holds_it"
SERVERS = {
    "vLLM's rules, computed by torch": ("test_to_vllm.py", "every_family_that_it_serves", "{kind}"),
    "llama.cpp": (
        "test_to_gguf_lora.py",
        "llama_cpp_computes_the_adapter_s_logits",
        "lora-{kind}",
    ),
    "MLX-LM": ("test_to_mlx.py", "mlx_lm_computes_the_adapter_s_logits", "lora-{kind}"),
}
"""The columns of the second table: file, test, and the id of its parameters."""
WHAT = (
    "Tiny models with random weights and random adapter leaves, float32. A number is the largest"
    " difference of a logit between the adapter and what was exported, loaded again (the limit is"
    " 1e-4 of the largest logit). A name is the target that the refusal names; the test exports to"
    " it."
)
SERVED = (
    "The same adapter (LoRA of rank 4 on four modules of each layer) on each family, computed from"
    " the exported files by other programs, on rows of 7 to 16 tokens:"
)


class Results:
    """A pytest plugin that gathers what the tests recorded, by test and parameters."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, str], str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test recorded; a failed one is shown as such."""
        named = re.match(r".*::test_(\w+)\[(.+)\]", report.nodeid)
        if named is None or report.when != "call" or report.skipped:
            return
        recorded = dict(report.user_properties)
        gap = recorded.get("gap")
        text = recorded.get("instead", "") if gap is None else f"{gap:.1e}"
        self.found[named[1], named[2]] = "FAILED" if report.failed else str(text)


def holds() -> list[str]:
    """Return the table of what each target can hold."""
    rows = [f"| `{name}` | {target.holds} |" for name, target in TARGETS.items()]
    return ["| `--to` | what it holds |", "|---|---|", *rows]


def matrix(results: Results) -> list[str]:
    """Return the table of methods and targets."""
    targets = list(dict.fromkeys(to for *_, to in CASES.values()))
    lines = ["| method | " + " | ".join(targets) + " |", "|---" * (len(targets) + 1) + "|"]
    for name in METHODS:
        cells = (results.found.get((MATRIX, f"{name}-{to}"), "not run") for to in targets)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def served(results: Results) -> list[str]:
    """Return the table of families and servers."""
    lines = ["| family | " + " | ".join(SERVERS) + " |", "|---" * (len(SERVERS) + 1) + "|"]
    for kind in FAMILIES:
        cells = (
            results.found.get((test, ids.format(kind=kind)), "not installed")
            for _, test, ids in SERVERS.values()
        )
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return lines


def versions(names: Iterable[str]) -> str:
    """Return the versions of the packages that are installed."""
    found: list[str] = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def page(text: str, results: Results) -> str:
    """Return the page with new tables; what stands before them stays."""
    head = text.partition(HOLDS)[0]
    packages = versions(("jax", "torch", "peft", "gguf", "llama-cpp-python", "mlx-lm"))
    where = f"On a CPU with {packages}, Python {platform.python_version()}."
    parts = [
        HOLDS,
        *holds(),
        "",
        MEASURED,
        f"`python -m tests.export.report` writes these tables. {where}",
    ]
    parts += ["", WHAT, "", *matrix(results), "", SERVED, "", *served(results), ""]
    return head + "\n".join(parts)


def main(argv: list[str]) -> int:
    """Run the tests and write the page."""
    results, here = Results(), Path(__file__).parent
    tests = [f"{here / 'test_matrix.py'}::test_{MATRIX}"]
    tests += [f"{here / file}::test_{test}" for file, test, _ in SERVERS.values()]
    code = pytest.main(["-q", *tests, *argv], plugins=[results])
    PAGE.write_text(page(PAGE.read_text(), results))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
