"""The page of large plans is made of its results, and the command goes on where it was stopped."""

from __future__ import annotations

import argparse

from benchmarks import scale


def test_the_page_is_what_the_results_say():
    assert scale.page(scale.lines()) == scale.PAGE.read_text()


def test_what_is_there_is_not_planned_again():
    assert all(case.devices in (16, 64, 128, 256, 512) for case in scale.done())


def test_the_grid_has_every_model_topology_and_strategy():
    options = argparse.Namespace(
        chosen=False, models=scale.MODELS, topologies=scale.TOPOLOGIES, strategies=scale.STRATEGIES, quant="none"
    )
    found = list(scale.cases(options))
    assert len(set(found)) == 3 * 3 * 6
    assert {case.devices for case in found} == {128, 256}
