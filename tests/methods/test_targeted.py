"""What methods with target options share: files of methods of which PEFT lacks some of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from tests.conformance.conftest import moved
from tests.core.helpers import load
from tests.hub.helpers import assert_bit_equal

SITES = ("q_proj", "down_proj")
METHODS = {
    "ia3": jaxpeft.IA3(targets=SITES, feedforward=("down_proj",), layers_to_transform=(1,)),
    "ln_tuning": jaxpeft.LNTuning(layers_to_transform=(1,)),
    "road": jaxpeft.RoAd(targets=SITES, group_size=8, exclude=("0.mlp.down_proj",)),
    "shira": jaxpeft.SHiRA(rank=2, targets=SITES, layers_to_transform=(1,)),
    "vera": jaxpeft.VeRA(rank=8, targets=SITES, exclude=("q_proj",)),
    "randlora": jaxpeft.RandLora(rank=8, targets=SITES, exclude=("q_proj",)),
    "c3a": jaxpeft.C3A(block_size=8, targets=SITES, exclude=("q_proj",)),
    "gralora": jaxpeft.GraLoRA(rank=4, targets=SITES, exclude=("q_proj",)),
}


@pytest.mark.parametrize("name", METHODS)
def test_sites_are_named_one_by_one_where_peft_lacks_the_option_that_chooses_them(
    name: str, tmp_path: Path
) -> None:
    method: Any = METHODS[name]
    model, base = load("llama")
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert all(target.startswith("model.layers.") for target in config["target_modules"])
    assert not config.get("layers_to_transform") and not config.get("exclude_modules")
    assert_bit_equal(jaxpeft.load_adapter(tmp_path, model, base)[1], params)
