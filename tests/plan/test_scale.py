"""The page of large plans is made of its results, and the command goes on where it was stopped."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest

from benchmarks import scale


def test_the_page_is_what_the_results_say():
    assert scale.page(scale.lines()) == scale.PAGE.read_text()


def test_what_is_there_is_not_planned_again():
    assert all(case.devices in (16, 64, 128, 256, 512) for case in scale.done())


def test_the_grid_has_every_model_topology_and_strategy():
    options = argparse.Namespace(
        chosen=False,
        models=scale.MODELS,
        topologies=scale.TOPOLOGIES,
        strategies=scale.STRATEGIES,
        quant="none",
    )
    found = list(scale.cases(options))
    assert len(set(found)) == 3 * 3 * 6
    assert {case.devices for case in found} == {128, 256}


def test_a_case_without_a_plan_is_told_by_the_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(scale, "RESULTS", tmp_path / "scale.jsonl")
    monkeypatch.setattr(scale, "PAGE", tmp_path / "scale.md")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: None)
    assert scale.main(["--models", "llama3_8b", "--strategies", "fsdp"]) == 1
    assert scale.main(["--write-only"]) == 0
    assert not scale.lines()


@pytest.mark.parametrize(
    "words", [["--models", "lama"], ["--strategies", "bogus"], ["--quant", "nf5"]]
)
def test_what_is_misspelt_is_refused(words: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        scale.main([*words, "--write-only"])
