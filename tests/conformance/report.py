"""Tries every method and writes docs/methods.md from what was found:
`python -m tests.conformance.report`.

Further arguments go to pytest, such as `-n 2`; `--capabilities` alone writes the first table anew,
keeps the others, and runs no test. `--missing`, first, tries only the rows that the page lacks and
keeps what it says of the others.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAXPEFT_TESTS", "full")

import jax
import pytest

import jaxpeft
from jaxpeft import models
from jaxpeft.core.folding import can_fold
from jaxpeft.core.tree import count
from jaxpeft.methods import METHODS
from jaxpeft.methods.unsupported import UNSUPPORTED
from jaxpeft.models.base import ModelOptions, abstract_params
from tests.conformance.rows import ROWS, SHOWN

ROOT = Path(__file__).parents[2]
OUT = ROOT / "docs" / "methods.md"
LLAMA_1B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "rope_theta": 500000.0,
}
HEAD = """# Methods

Every method is one file in `jaxpeft/methods/`, a frozen dataclass of hyperparameters. `config.method.name` selects it;
its docstring and fields document the options. `python -m tests.conformance.report` tests every method and generates
this page; nothing in its tables is typed by hand.

A new method is one file, its line in the table of `jaxpeft/methods/__init__.py`, and one row in
`tests/conformance/rows.py`; this page then lists it, too.
"""


class Results:
    """A pytest plugin that gathers, by method and property, what passed and failed, and the gaps of
    logits.
    """

    def __init__(self) -> None:
        self.passed: dict[tuple[str, str], int] = defaultdict(int)
        self.failed: dict[tuple[str, str], int] = defaultdict(int)
        self.gaps: dict[tuple[str, str], float] = defaultdict(float)
        self.rows: frozenset[str] = frozenset()  # none for all

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take a test's result."""
        found = re.match(r".*::test_(\w+)\[(.+)\]", report.nodeid)
        if found is None or (report.when != "call" and not report.failed):
            return
        test = found[1]
        name = found[2] if test in LIBRARY else row_of(found[2])
        if self.rows and name not in self.rows:
            return
        if report.passed:
            self.passed[name, test] += 1
        elif report.failed:
            self.failed[name, test] += 1
        for key, value in report.user_properties:
            if key == "gap" and isinstance(value, float):
                self.gaps[name, test] = max(self.gaps[name, test], value)


def row_of(parameters: str) -> str:
    """Return the row of a test's parameters, such as `lora pissa-llama-scanned`."""
    return next(
        name for name in sorted(ROWS, key=len, reverse=True) if parameters.startswith(f"{name}-")
    )


def share(method: Any) -> str:
    """Return the share of parameters that a method trains of a Llama of the 1B shape, with its
    default options.
    """
    model = models.build(
        LLAMA_1B, ModelOptions("causal_lm", None, jax.numpy.bfloat16, scan_layers=False)
    )
    base = abstract_params(model)
    try:
        params = jax.eval_shape(lambda p: jaxpeft.rewrite(method, p, jax.random.key(0)), base)
    except jaxpeft.JaxpeftError:
        return "-"
    trainable, _ = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    return f"{count(trainable) / count(base):.3%}"


def capabilities() -> list[str]:
    """Write the table of what each method can do."""
    lines = [
        (
            "| method | what it does | trained, 1B | merges | PEFT type | several in one batch |"
            " quantized base | paper | lines |"
        ),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cls in METHODS.items():
        row = next(row for key, row in ROWS.items() if key == name or key.startswith(f"{name} "))
        source = Path(sys.modules[cls.__module__].__file__ or "")
        text = " ".join((sys.modules[cls.__module__].__doc__ or "").split("\n\n")[0].split())
        what = text.partition(": ")[2] or text
        adds = any(part.leaves.site or part.leaves.root for part in row.method.parts())
        yes = {True: "yes", False: "no"}
        lines.append(
            f"| `{name}` | {what.rstrip('.')} | {share(SHOWN[name] if name in SHOWN else cls())} |"
            f" {yes[all(can_fold(type(p)) for p in row.method.parts())] if adds else 'is plain'} |"
            f" {cls.peft.type or '-'} | {yes[adds and not row.alone]} | {yes[not row.unquantized]}"
            f" | {paper(cls.paper)} | {sum(1 for _ in source.open())} |"
        )
    return lines


def paper(text: str) -> str:
    """Link a paper."""
    return (
        f"[{text}](https://arxiv.org/abs/{text.removeprefix('arXiv:')})"
        if text.startswith("arXiv:")
        else text or "-"
    )


@dataclass(frozen=True)
class Earlier:
    """What a page says of rows that were tried before.

    Attributes:
        properties: its lines of the table of properties, by row.
        files: its lines of the table of files, by row.
        tests: the properties, in the order of their letters.
        library: the lines of the table of the adapters library.
        passed: how many checks passed.
        tried: how many were tried.
    """

    properties: Mapping[str, str] = field(default_factory=dict[str, str])
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    tests: tuple[str, ...] = ()
    library: tuple[str, ...] = ()
    passed: int = 0
    tried: int = 0

    @classmethod
    def of(cls, text: str) -> Earlier:
        """Return what a page says."""
        properties, _, files = text.partition("## Properties\n")[2].partition("## Files\n")
        files, _, library = files.partition("| adapter |")
        counts = re.search(r"(\d+) of (\d+) checks", properties)
        return cls(
            rows_in(properties),
            rows_in(files),
            tuple(
                found.replace(" ", "_") for found in re.findall(r"\* \*\*\w\*\* (.+)", properties)
            ),
            tuple(rows_in(library.partition("\n")[2]).values()),
            *map(int, counts.groups() if counts else (0, 0)),
        )

    def missing(self) -> list[str]:
        """List the rows that the page lacks."""
        return [name for name in ROWS if name not in self.properties or name not in self.files]


def rows_in(text: str) -> dict[str, str]:
    """Return the lines of a table, by the first cell."""
    lines = (line for line in text.splitlines() if re.match(r"\| (?!method \|)", line))
    return {line.split("|")[1].strip(): line for line in lines}


def tables(results: Results, earlier: Earlier) -> list[str]:
    """Write the tables of properties and of files."""
    tests = list(dict.fromkeys(test for _, test in (*results.passed, *results.failed)))
    ours = list(
        dict.fromkeys((*earlier.tests, *(test for test in tests if test not in (*PEFT, *LIBRARY))))
    )
    letters = {test: chr(ord("a") + i) for i, test in enumerate(ours)}
    lines = [f"* **{letters[test]}** {test.replace('_', ' ')}" for test in ours]
    lines += [
        "",
        "A cell has how many checks passed; an empty one was not tried since its property is new.",
        "",
        "| method | " + " | ".join(letters.values()) + " |",
        "|---" * (len(ours) + 1) + "|",
    ]
    for name in ROWS:
        new = f"| {name} | " + " | ".join(cell(results, name, test) for test in ours) + " |"
        old = earlier.properties.get(name)
        # a property that is newer than the row stays empty
        lines.append(f"{old}{'  |' * (len(ours) - len(earlier.tests))}" if old else new)
    passed, failed = sum(results.passed.values()), sum(results.failed.values())
    passed, tried = passed + earlier.passed, passed + failed + earlier.tried
    lines += [
        "",
        (f"{passed} of {tried} checks passed, of {len(METHODS)} methods in {len(ROWS)} variants."),
        "",
    ]
    lines += ["## Files", "", FILES, ""]
    lines += [
        "| method | written here, read by `peft` | written by `peft`, read here | resumed |",
        "|---|---|---|---|",
    ]
    for name in ROWS:
        exact = results.passed[name, RESUMED] and not results.failed[name, RESUMED]
        new = f"| {name} | {gaps(results, name, PEFT)} | {'0, every bit' if exact else 'differs'} |"
        lines.append(earlier.files.get(name, new))
    cases = [name for name, test in results.passed if test == LIBRARY[0]]
    if cases or earlier.library:
        lines += [
            "",
            "| adapter | written here, read by `adapters` | written by `adapters`, read here |",
            "|---|---|---|",
        ]
        lines += earlier.library or [
            f"| {name} | {gaps(results, name, LIBRARY)} |" for name in cases
        ]
    return lines


PEFT = (
    "the_real_peft_gives_the_logits_of_what_jaxpeft_saved",
    "jaxpeft_gives_the_logits_of_what_the_real_peft_saved",
)
LIBRARY = (
    "the_library_gives_the_logits_of_what_jaxpeft_saved",
    "jaxpeft_gives_the_logits_of_what_the_library_saved",
)
RESUMED = "interrupted_and_restored_it_goes_on_bit_by_bit"
FILES = (
    "Adapters go both ways between jaxpeft and the real `peft` 0.21 on torch, and bottleneck"
    " adapters between jaxpeft and the real `adapters` 1.3, with random leaves. The table shows the"
    " largest difference of a logit in float32, over the models that both have (the limit is 1e-4"
    " of the largest logit), and a dash where none of their files can hold the method. Resumed"
    " compares a run that was interrupted and restored with the run that was not."
)


def gaps(results: Results, name: str, tests: Iterable[str]) -> str:
    """Write the largest difference of a logit in each of some tests."""
    found = (results.gaps.get((name, test)) for test in tests)
    return " | ".join("-" if gap is None else f"{gap:.1e}" for gap in found)


def cell(results: Results, name: str, test: str) -> str:
    """Return how many of a method's checks of a property passed."""
    passed, failed = results.passed[name, test], results.failed[name, test]
    return f"{passed}/{passed + failed}" if passed + failed else ""


def page(results: Results | None, earlier: Earlier) -> str:
    """Write the page; without results its first table alone."""
    libraries = ", ".join(
        f"{name} {version(name)}" for name in ("jax", "torch", "transformers", "peft")
    )
    where = f"On the CPU with {libraries}, Python {platform.python_version()}."
    tried = ["## Properties", "", *tables(results, earlier), ""] if results else []
    return "\n".join(
        [HEAD, "## What each can do", "", where, "", *capabilities(), "", peft_types(), "", *tried]
    )


def peft_types() -> str:
    """Return which kinds of files of PEFT's no method reads, and why."""
    from peft import PeftType

    count = len(PeftType)
    lines = [
        (
            f"Of the {count} types of PEFT {version('peft')} {count - len(UNSUPPORTED)} go both"
            " ways. A file of another is refused by name, with the reason:"
        ),
        "",
        "| PEFT type | why not |",
        "|---|---|",
        *(f"| `{kind}` | {why} |" for kind, why in UNSUPPORTED.items()),
        "",
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Run the tests and write the page."""
    if argv == ["--capabilities"]:
        _, heading, tried = OUT.read_text().partition("## Properties\n")
        OUT.write_text(page(None, Earlier()) + heading + tried)
        return 0
    results, earlier = Results(), Earlier()
    library = [f"{ROOT / 'tests' / 'hub' / 'test_adapterhub.py'}::test_{test}" for test in LIBRARY]
    properties = [
        str(Path(__file__).with_name(file)) for file in ("test_properties.py", "test_peft.py")
    ]
    if argv[:1] == ["--missing"]:
        earlier, library = Earlier.of(OUT.read_text()), []
        results.rows = frozenset(earlier.missing())
        chosen = (f"({name.replace(' ', ' and ')})" for name in results.rows)
        argv = ["-k", " or ".join(chosen), *argv[1:]]
    code = pytest.main(["-q", *properties, *library, *argv], plugins=[results])
    OUT.write_text(page(results, earlier))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
