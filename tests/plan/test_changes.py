"""What is tried where a run does not fit."""

import dataclasses

import pytest

from jaxpeft.config import load
from jaxpeft.plan import topology
from jaxpeft.plan.changes import add_nearest, changes, repairs, summary
from jaxpeft.plan.examine import Setting, examine
from jaxpeft.plan.report import Memory, Row
from jaxpeft.plan.subject import with_changes
from tests.plan.tiny import NARROW, SMALL, write


@pytest.fixture
def config(tmp_path):
    return load(write(tmp_path)[0])


def texts(found):
    return [change.text for change in found]


def test_what_leaves_the_numbers_alone_comes_first(config):
    assert texts(changes(config, "products", 4)) == [
        "model.remat attention",
        "model.remat full",
        "train.accumulation 2",
        "train.accumulation 4",
        "model.remat full, train.accumulation 4",
        "model.quant int8",
        "model.quant int8, model.remat full, train.accumulation 4",
        "model.quant nf4",
        "model.quant nf4, model.remat full, train.accumulation 4",
        "train.batch_size 8, train.accumulation 1",
        "train.batch_size 4, train.accumulation 1",
    ]


def test_what_is_done_already_is_not_offered(config):
    done = with_changes(config, model__quant="nf4", train__accumulation=16)
    assert texts(changes(done, "full", 1)) == [
        f"train.batch_size {n}, train.accumulation 1" for n in (8, 4, 2, 1)
    ]


def test_a_batch_that_cannot_be_spread_is_repaired(config):
    parts = with_changes(config, train__accumulation=4)
    assert texts(repairs(parts, 8)) == ["train.accumulation 2", "train.accumulation 1"]
    assert texts(repairs(config, 24)) == ["train.batch_size 24, train.accumulation 1"]


def setting(limit):
    where = topology.read("cpu:8")
    return Setting(SMALL | NARROW, where, topology.devices(where), limit, True)


@pytest.mark.slow
def test_the_nearest_change_is_compiled_and_fits(config):
    fsdp = with_changes(config, mesh__strategy="fsdp", model__remat="none")
    free = examine(setting(None), fsdp)
    assert free.row.fits is None
    assert free.row.verdict == "memory limit is unknown; give --hbm"
    assert free.row.memory is not None
    limit = 0.9 * free.row.memory.total
    row = add_nearest(setting(limit), examine(setting(limit), fsdp), most=6)
    assert row.fits is False
    assert row.verdict.startswith("does not fit, by 0.0")
    assert row.nearest is not None
    assert row.nearest.fits is True
    assert row.nearest.memory is not None
    assert row.nearest.memory.total <= limit
    assert row.nearest.change


@pytest.mark.slow
def test_what_arithmetic_rules_out_is_not_compiled(config):
    fsdp = with_changes(config, mesh__strategy="fsdp")
    row = add_nearest(setting(1000), examine(setting(1000), fsdp), most=6)
    assert row.nearest is None
    assert row.tried[0].startswith(
        "batch size, remat and quantization, which need at least about 0.0"
    )


def test_a_refused_batch_says_why_and_is_repaired(config):
    odd = with_changes(config, mesh__strategy="replicated", train__batch_size=12)
    found = examine(setting(2**34), odd)
    assert found.row.verdict.startswith(
        "refused: train.batch_size: 12 is not divisible by 8 devices"
    )
    row = add_nearest(setting(2**34), found, most=2)
    assert row.nearest is not None
    assert row.nearest.change == "train.batch_size 16, train.accumulation 1"


def test_another_strategy_that_fits_is_named():
    memory = Memory(1, 1, 1, 1, 1, 5, 6)
    yes = Row("fsdp", "", {}, 1, 1, "full", "none", "xla", True, "fits", memory)
    no = dataclasses.replace(
        yes, strategy="replicated", fits=False, verdict="does not fit, by 1.00 GiB"
    )
    assert [row.verdict for row in summary([no, yes])] == [
        "does not fit, by 1.00 GiB; fsdp fits",
        "fits",
    ]
    assert summary([no]) == (no,)
