"""An adapter that changes nothing is refused by every target, and exported if that is asked for."""

from __future__ import annotations

import dataclasses

import pytest

import jaxpeft
from jaxpeft.errors import AdapterError
from jaxpeft.export.export_targets import TARGETS
from tests.export.making import CAUSAL, LINEAR, LORA, SEQUENCE

FRESH = {
    "lora": (LORA, "llama", CAUSAL),
    "lora of a classifier": (LORA, "bert", SEQUENCE),
    "pissa": (dataclasses.replace(LORA, init_weights="pissa"), "llama", CAUSAL),
    "dora": (jaxpeft.DoRA(rank=4, targets=LINEAR), "llama", CAUSAL),
    "ia3": (jaxpeft.IA3(targets=LINEAR), "llama", CAUSAL),
    "oft": (jaxpeft.OFT(block_size=4, targets=LINEAR), "llama", CAUSAL),
}


@pytest.mark.parametrize(("method", "kind", "task"), FRESH.values(), ids=FRESH)
@pytest.mark.representatives("oft", "lora", "lora of a classifier")
def test_a_fresh_adapter_is_refused(make, tmp_path, method, kind, task):
    made = make(method, kind, task, size=0.0)
    text = made.refused(tmp_path / "out", AdapterError, "peft")
    assert text.startswith(
        f"{made.folder}: is a no-op: with it, the model computes the logits of its base"
    )
    assert "(a fresh LoRA has B = 0)" in text and text.endswith("pass --allow-no-op")


@pytest.mark.parametrize("to", TARGETS)
def test_every_target_refuses_it_unless_it_is_asked_for(make, tmp_path, to):
    quant = {"quant": "int8"} if to == "merged_quantized_reference" else {}
    made = make(LORA, "llama", CAUSAL, size=0.0, **quant)
    assert "is a no-op" in made.refused(tmp_path / "out", AdapterError, to)
    report = made.export(tmp_path / "out", to, allow_no_op=True)
    assert report.change == 0 and report.lines[-2].endswith("from its base: 0")


def test_a_trained_head_alone_is_a_change(make, tmp_path):
    made = make(jaxpeft.Head(), "bert", SEQUENCE)
    assert made.export(tmp_path / "out", "peft").change > 0.01


@pytest.mark.parametrize(("size", "refused"), [(1e-3, False), (1e-9, True)])
def test_what_counts_is_a_change_of_the_outputs_above_rounding(make, tmp_path, size, refused):
    """LoRA's B is moved by `size`, so the outputs are changed in proportion."""
    made = make(LORA, "llama", CAUSAL, size=size)
    if refused:
        assert "is rounding)" in made.refused(tmp_path / "out", AdapterError, "peft")
        return
    report = made.export(tmp_path / "out", "peft")
    assert 0 < report.change < 0.1
    assert f"{report.change:.2g}" in report.lines[-2]
