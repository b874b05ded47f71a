"""Adapter folders for vLLM: read by the real peft, and by the rules of vLLM's loader, which are
written down here a second time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from tests.export.making import CAUSAL, FAMILIES, HELD, assert_close, theirs, torch_with
from tests.hub.helpers import peft_load


def as_vllm(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the matrices that vLLM adds: the scale is alpha / r of the config for all modules,
    whatever the patterns say, and a name is that of a module after `base_model.model.`.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config.get("modules_to_save")
    assert not config.get("use_dora") and not config["use_rslora"]
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for name, a in tensors.items():
        for ends in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
            if name.endswith(ends[0]):
                b = tensors[name.replace(*ends)]
                assert a.shape[0] == b.shape[1] == config["r"]
                product = config["lora_alpha"] / config["r"] * b @ a
                module = ".".join(name.removesuffix(f".{ends[0]}").split(".")[2:])
                deltas[module] = product.T if "embedding" in ends[0] else product
    assert len(tensors) == 2 * len(deltas)
    return deltas


@pytest.mark.parametrize("method", HELD.values(), ids=HELD)
@pytest.mark.representatives("ranks and alphas", "lora")
def test_vllm_and_peft_compute_the_adapter_s_logits(make, tmp_path, method):
    made = make(method, "llama", CAUSAL)
    report = made.export(tmp_path / "out", "vllm")
    assert_close(torch_with(made.base, as_vllm(tmp_path / "out")), made.logits())
    assert_close(theirs(CAUSAL, peft_load(made.base, CAUSAL, tmp_path / "out")), made.logits())
    assert report.gap < 1e-4 < report.change


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.representatives("qwen3")
def test_every_family_that_it_serves(make, tmp_path, record_property, kind):
    made = make(HELD["lora"], kind, CAUSAL)
    made.export(tmp_path / "out", "vllm")
    found = torch_with(made.base, as_vllm(tmp_path / "out"))
    assert_close(found, made.logits())
    record_property("gap", float(np.abs(found - made.logits()).max()))


def test_an_embedding_and_a_head_where_the_class_has_them(make, tmp_path):
    method = jaxpeft.LoRA(rank=4, targets=("embed_tokens", "lm_head", "v_proj"))
    made = make(method, "llama", CAUSAL, size=0.5)
    made.export(tmp_path / "out", "vllm")
    deltas = as_vllm(tmp_path / "out")
    assert {"model.embed_tokens", "lm_head"} < set(deltas)
    assert_close(torch_with(made.base, deltas), made.logits())
    text = make(method, "qwen2", CAUSAL, base=None).refused(tmp_path / "other", to="vllm")
    assert "lm_head is adapted, but only modules of layers can be; use --to merged" in text


def test_the_last_line_is_how_to_serve_it(make, tmp_path):
    made = make(jaxpeft.LoRA(rank=9, targets=("q_proj",)), "llama", CAUSAL)
    report = made.export(tmp_path / "out", "vllm")
    assert report.lines[-1] == (
        f"serve it: vllm serve {made.base} --enable-lora --max-lora-rank 16 --lora-modules"
        f" NAME={tmp_path / 'out'}"
    )
    assert report.lines[0].startswith(f"wrote {tmp_path / 'out'}: lora for vLLM, rank 9, ")


def test_a_rank_that_no_server_takes_is_refused(make, tmp_path):
    made = make(jaxpeft.LoRA(rank=513, targets=("q_proj",)), "llama", CAUSAL)
    text = made.refused(tmp_path / "out", to="vllm")
    assert "vLLM cannot hold it: the rank is 513, above 512; use --to merged" in text
