"""What the pages of docs/ show works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_both_examples_of_your_own_model_run() -> None:
    codes = re.findall(r"```python\n(.*?)```", (DOCS / "your_own_model.md").read_text(), re.DOTALL)
    linen, nnx = ({} for _ in codes)
    with jax.numpy_dtype_promotion("standard"):
        run(codes[0], linen)
        run(codes[1], nnx)
    assert float(linen["value"]) < 2.2  # ln 10 is 2.30
    assert set(linen["merged"]) == set(linen["base"])
    assert float(abs(nnx["merged"](nnx["x"]) - nnx["y"]).max()) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_custom_loop_trains_a_sharded_quantized_base_on_8_devices(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "custom_loop.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        run(code, names)
    assert names["losses"][-1] < 0.6 * names["losses"][0]
    assert dict(names["mesh"].shape) == {
        "data": 1,
        "fsdp": 4,
        "expert": 1,
        "sequence": 1,
        "tensor": 2,
    }
    params, model, batch = names["params"], names["model"], names["batch"]
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    codes = [
        leaf for path, leaf in paths.walk(params) if path[-1] == "kernel_nf4" and "layer" in path
    ]
    assert len(codes) == 6  # those of a layer; the layers are stacked
    assert {leaf.addressable_shards[0].data.size * 8 / leaf.size for leaf in codes} == {1.0}
    assert names["train_step"]._cache_size() == 1  # where leaves lie stays the same

    _, base = jaxpeft.load(names["path"], **names["base"], scan_layers=True, quant="nf4")
    _, loaded = jaxpeft.load_adapter("my-adapter", model, base)
    inputs = np.asarray(batch["input_ids"]), np.asarray(batch["attention_mask"])
    alone, spread = jaxpeft.apply(model, loaded, *inputs), jaxpeft.apply(model, params, *inputs)
    np.testing.assert_allclose(alone, spread, atol=1e-5)


def run(code: str, names: dict[str, Any]) -> None:
    exec(compile(code, "docs", "exec"), names)


@pytest.mark.parametrize("page", sorted(path.name for path in DOCS.glob("*.md")))
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", (DOCS / page).read_text()):
        assert link.startswith("https://") or (DOCS / link).exists(), link


def test_the_page_of_exports_has_every_target_and_every_method() -> None:
    from tests.export import report
    from tests.export.test_matrix import METHODS

    text = (DOCS / "export.md").read_text()
    assert "\n".join(report.holds()) in text
    _, _, measured = text.partition(report.MEASURED)
    rows = [line.split(" | ")[0].removeprefix("| ") for line in measured.splitlines()]
    assert not {*METHODS, *report.FAMILIES} - set(rows)
    assert "FAILED" not in measured and "not run" not in measured
