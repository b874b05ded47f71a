"""The page of a comparison: intervals, differences, failures; and the statistics of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from jaxpeft.compare.spread import Spread, difference
from jaxpeft.config import load
from tests.compare.pages import write_comparison
from tests.report.pages import Page


def test_the_interval_of_the_mean_is_students() -> None:
    values = (0.81, 0.84, 0.9, 0.79)
    wanted = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert Spread(values).interval == pytest.approx(wanted)
    assert Spread((0.5,)).interval is None


def test_a_difference_is_paired_by_seed() -> None:
    gap = difference({0: 0.5, 2: 0.7, 3: 0.9}, {0: 0.4, 1: 0.0, 2: 0.5})
    assert gap is not None and gap.values == pytest.approx((0.1, 0.2))
    wanted = stats.ttest_rel((0.5, 0.7), (0.4, 0.5)).confidence_interval(0.95)
    assert gap.interval == pytest.approx((wanted.low, wanted.high))
    assert difference({0: 1.0}, {1: 1.0}) is None


def test_the_page_has_every_method_with_its_interval_and_difference(tmp_path: Path) -> None:
    page = write_comparison(tmp_path / "run")
    found = Page(page.read_text())
    text = found.text
    assert found.headings[0] == "3 methods on tiny"
    assert "0.1000 before training → 0.9100 test accuracy of lora, the best mean" in text
    for part in (
        "full 0.8500 0.2147 to 1.4853",
        "lora 0.9100 0.1476 to 1.6724",
        "+0.0600 -0.0671 to 0.1871",
        "bitfit (0 of 2 runs) -",
        "bitfit, seed 0: it broke",
        "minus full",
        "+0.0500",
        "1,000 10.000 % 1.50 GB 61.4 s",
        "nearest-class-mean accuracy on b/c.jsonl",
        "How to use the adapter of lora print('used')",
        f"python -m jaxpeft.report --run {tmp_path}/run/lora/seed-0",
    ):
        assert part in text, part
    values = json.loads((tmp_path / "run" / "comparison.json").read_text())["candidates"]["lora"]
    assert values["minus_reference"]["mean"] == pytest.approx(0.06)
    assert values["figure"]["interval"] == pytest.approx([0.1476, 1.6724], abs=1e-4)
    config = load(tmp_path / "run" / "config.json")
    assert config.compare.titles == ("full", "lora", "bitfit")


def test_what_failed_is_never_markup(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    html = write_comparison(tmp_path / "run", hostile, prediction=hostile).read_text()
    assert "<script" not in html
    assert Page(html).text.count(hostile) == 2
