"""MLX-LM's adapter files: by its formula in NumPy, and by the package itself where it runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from tests.export.making import (
    BATCH,
    CAUSAL,
    FAMILIES,
    HELD,
    LAYERS,
    assert_close,
    real,
    torch_with,
)

DORA = jaxpeft.DoRA(rank=4, alpha=6.0, targets=LAYERS)


def as_mlx(folder: Path, base: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the matrices that MLX-LM adds: `scale * lora_b.T @ lora_a.T`, and with DoRA the rest
    of `m / |W + ...| (W + ...)`, of every module that `num_layers` and `keys` name.
    """
    config = json.loads((folder / "adapter_config.json").read_text())
    options, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    weights = load_file(base / "model.safetensors")
    assert options["dropout"] == 0
    layers = 2  # of the tiny models
    deltas: dict[str, np.ndarray[Any, Any]] = {}
    used: set[str] = set()
    for key in options["keys"]:
        inside = [f"model.layers.{i}.{key}" for i in range(layers)][-config["num_layers"] :]
        for module in inside if f"{inside[-1]}.weight" in weights else [key]:
            a, b = (tensors.get(f"{module}.lora_{end}") for end in "ab")
            if a is None or b is None:
                continue
            assert a.shape[1] == b.shape[0] == options["rank"]
            used |= {f"{module}.lora_a", f"{module}.lora_b"}
            delta = options["scale"] * b.T @ a.T
            weight = weights[f"{module}.weight"]
            if config["fine_tune_type"] == "dora":
                whole = weight + delta
                norm = tensors[f"{module}.m"] / np.linalg.norm(whole, axis=1)
                used.add(f"{module}.m")
                delta = norm[:, None] * whole - weight
            deltas[module] = delta.T if delta.shape != weight.shape else delta
    assert used == set(tensors)
    return deltas


CASES = {**HELD, "dora": DORA}


@pytest.mark.parametrize("method", CASES.values(), ids=CASES)
@pytest.mark.representatives("lora", "one layer", "ranks and alphas", "dora")
def test_the_formula_of_mlx_gives_the_adapter_s_logits(make, tmp_path, method):
    made = make(method, "llama", CAUSAL)
    report = made.export(tmp_path / "out", "mlx")
    assert_close(torch_with(made.base, as_mlx(tmp_path / "out", made.base)), made.logits())
    assert report.gap < 1e-4 < report.change
    assert report.lines[-1].endswith(f"--adapter-path {tmp_path / 'out'}")


def test_an_embedding_and_a_head(make, tmp_path):
    method = jaxpeft.LoRA(rank=4, targets=("embed_tokens", "lm_head", "v_proj"))
    made = make(method, "llama", CAUSAL, size=0.5)
    made.export(tmp_path / "out", "mlx")
    deltas = as_mlx(tmp_path / "out", made.base)
    assert {"model.embed_tokens", "lm_head"} < set(deltas)
    assert_close(torch_with(made.base, deltas), made.logits())


def test_the_options_are_those_of_the_adapter(make, tmp_path):
    method = jaxpeft.LoRA(rank=4, alpha=6.0, targets=("q_proj",), layers_to_transform=(1,))
    made = make(method, "llama", CAUSAL)
    made.export(tmp_path / "out", "mlx")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text()) == {
        "model": str(made.base),
        "fine_tune_type": "lora",
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 1.5, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
    }


# ---------------------------------------------------------------------------------------- MLX-LM


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "ranks and alphas", "one layer", "dora"])
@pytest.mark.representatives("lora-qwen3", "dora-llama")
def test_mlx_lm_computes_the_adapter_s_logits(make, tmp_path, record_property, kind, name):
    utils = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    import mlx.core as mx

    made = make(CASES[name], kind, CAUSAL)
    made.export(tmp_path / "out", "mlx")
    mx.set_default_device(mx.cpu)
    rope = json.loads((made.base / "config.json").read_text())["rope_parameters"]
    # MLX-LM's Qwen2 does not know where transformers 5 writes it
    model, _ = utils.load_model(made.base, model_config={"rope_theta": rope["rope_theta"]})
    base = real(np.array(model(mx.array(BATCH.ids))))
    model = utils.load_adapters(model, str(tmp_path / "out"))
    found = real(np.array(model(mx.array(BATCH.ids))))  # rows are padded on the right
    assert_close(found, made.logits())
    assert np.abs(found - base).max() > 0.02
    record_property("gap", float(np.abs(found - made.logits()).max()))
