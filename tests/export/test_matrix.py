"""Every method and every target: it is exported with equal logits, or refused with the name of a
target that can hold it. `python -m tests.export.report` writes the table of docs/export.md from it.
"""

from __future__ import annotations

import re

import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.export.export_targets import TARGETS
from jaxpeft.export.probe import TOLERANCE
from tests.conformance.rows import DECODER, ROWS
from tests.export.making import CAUSAL, HELD, SEQUENCE

METHODS = {name: (row.method, row.models[0], row.moved) for name, row in ROWS.items()} | {
    f"lora {name}": (HELD[name], DECODER, 0.2) for name in ("rslora", "ranks and alphas")
}
CASES = {
    f"{name}-{to}": (*case, to)
    for name, case in METHODS.items()
    for to in TARGETS
    if to != "merged_quantized_reference"  # as `merged`, of a quantized base
}


@pytest.mark.parametrize(("method", "kind", "moved", "to"), CASES.values(), ids=CASES)
@pytest.mark.representatives(
    "lora-vllm", "vera-gguf-lora", "dora-mlx", "prefix-merged", "bitfit-vllm", "mixed-mlx"
)
def test_it_is_exported_or_refused_with_a_target_that_holds_it(
    make, tmp_path, record_property, method, kind, moved, to
):
    made = make(method, kind, CAUSAL if kind == DECODER else SEQUENCE, size=moved)
    try:
        report = made.export(tmp_path / "out", to)
    except ConfigError as error:
        (instead,) = set(re.findall(r"(?:use|with) --to ([\w-]+)", str(error)))
        record_property("instead", instead)
        assert to != "peft"
        report = made.export(tmp_path / "instead", instead)
    else:
        record_property("gap", report.gap)
    assert report.gap <= 10 * TOLERANCE and report.change > TOLERANCE
