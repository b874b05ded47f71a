"""llama.cpp's adapter files, read by the package `gguf`: the numbers are taken to the weights of
`transformers` by index arithmetic of the tests' own, and its rotation is computed in NumPy.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.export.to_gguf_lora import FILE, from_pairs, to_pairs
from tests.export.making import BATCH, CAUSAL, FAMILIES, HELD, assert_close, torch_with

HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def halves(rows: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Return rows in the order of transformers: row 2 i + j of a head in llama.cpp is its row
    j size / 2 + i.
    """
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for i in range(size // 2):
            for j in range(2):
                out[head * size + j * size // 2 + i] = rows[head * size + 2 * i + j]
    return out


def as_llama_cpp(folder: Path, architecture: str) -> dict[str, np.ndarray[Any, Any]]:
    """Return the matrices that llama.cpp adds, for the weights of transformers."""
    reader = gguf.GGUFReader(folder / FILE)
    fields = {key: reader.get_field(key).contents() for key in reader.fields if key[:4] != "GGUF"}
    alpha = fields["adapter.lora.alpha"]
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == architecture
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    deltas = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_a"):
            continue
        b, own = tensors[name[:-1] + "b"], name.removesuffix(".weight.lora_a")
        scale = alpha / b.shape[1]
        if own == "token_embd":  # looked up by row
            deltas["model.embed_tokens"] = scale * a @ b.T
        elif own == "output":
            deltas["lm_head"] = scale * b @ a
        else:
            _, layer, module = own.split(".")
            pairs = architecture == "llama" and module in HEADS
            rows = halves(b, HEADS[module]) if pairs else b
            deltas[f"model.layers.{layer}.{NAMES[module]}"] = scale * rows @ a
    assert len(tensors) == 2 * len(deltas)
    return deltas


@pytest.mark.parametrize("method", HELD.values(), ids=HELD)
@pytest.mark.representatives("ranks and alphas")
def test_the_numbers_in_the_file_are_the_adapter_s(make, tmp_path, method):
    made = make(method, "llama", CAUSAL)
    report = made.export(tmp_path / "out", "gguf-lora")
    assert_close(torch_with(made.base, as_llama_cpp(tmp_path / "out", "llama")), made.logits())
    assert report.gap < 1e-4 < report.change
    assert report.lines[-1].endswith(f"--lora {tmp_path / 'out' / 'adapter.gguf'}")


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.representatives("llama")
def test_every_family_has_its_architecture(make, tmp_path, kind):
    made = make(HELD["lora"], kind, CAUSAL)
    made.export(tmp_path / "out", "gguf-lora")
    architecture = "llama" if kind == "mistral" else kind
    deltas = as_llama_cpp(tmp_path / "out", architecture)
    assert_close(torch_with(made.base, deltas), made.logits())


def test_an_embedding_and_a_head(make, tmp_path):
    method = jaxpeft.LoRA(rank=4, targets=("embed_tokens", "lm_head", "up_proj"))
    made = make(method, "llama", CAUSAL, size=0.5)
    made.export(tmp_path / "out", "gguf-lora")
    deltas = as_llama_cpp(tmp_path / "out", "llama")
    assert {"model.embed_tokens", "lm_head"} < set(deltas)
    assert_close(torch_with(made.base, deltas), made.logits())


# ------------------------------------------------------------------------------------- the rotation


def rotate_halves(x: np.ndarray[Any, Any], position: int) -> np.ndarray[Any, Any]:
    """Rotate `[heads, size]` as transformers does: coordinate i with coordinate i + size / 2."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    first, second = x[:, :half], x[:, half:]
    turned = (
        first * np.cos(angle) - second * np.sin(angle),
        second * np.cos(angle) + first * np.sin(angle),
    )
    return np.concatenate(turned, axis=-1)


def rotate_pairs(x: np.ndarray[Any, Any], position: int) -> np.ndarray[Any, Any]:
    """Rotate `[heads, size]` as llama.cpp's llama does: coordinate 2 i with coordinate 2 i + 1."""
    half = x.shape[-1] // 2
    angle = position * 10_000.0 ** (-np.arange(half) / half)
    out = np.empty_like(x)
    out[:, 0::2] = x[:, 0::2] * np.cos(angle) - x[:, 1::2] * np.sin(angle)
    out[:, 1::2] = x[:, 1::2] * np.cos(angle) + x[:, 0::2] * np.sin(angle)
    return out


def test_attention_scores_are_equal_with_llama_cpp_s_rotation(make, tmp_path):
    """The base's weights in llama.cpp's order and the file's B, against those of transformers."""
    made = make(HELD["lora"], "llama", CAUSAL)
    made.export(tmp_path / "out", "gguf-lora")
    reader = gguf.GGUFReader(tmp_path / "out" / FILE)
    file = {tensor.name: tensor.data for tensor in reader.tensors}
    alpha = reader.get_field("adapter.lora.alpha").contents()
    base = load_file(made.base / "model.safetensors")
    x = np.random.default_rng(1).standard_normal((2, 32)).astype(np.float32)
    scores: dict[str, Any] = {}
    for rotate, gathered in ((rotate_halves, False), (rotate_pairs, True)):
        turned = []
        for name, module, token in (("attn_q", "q_proj", 0), ("attn_k", "k_proj", 1)):
            a, b = (file[f"blk.0.{name}.weight.lora_{end}"] for end in "ab")
            weight, heads = base[f"model.layers.0.self_attn.{module}.weight"], HEADS[name]
            delta = alpha / b.shape[1] * b @ a
            if gathered:
                weight = to_pairs(weight, heads)  # as the converter writes the base
            else:
                node = made.params["model"]["layers"]["0"]["self_attn"][module]
                scale = np.asarray(node["lora_scale"])
                delta = (scale * np.asarray(node["lora_a"]) @ np.asarray(node["lora_b"])).T
            out = ((weight + delta) @ x[token]).reshape(heads, -1)
            turned.append(rotate(out, position=3 + 4 * token))
        q, k = turned
        scores[rotate.__name__] = (q * np.repeat(k, 2, axis=0)).sum(-1)
    np.testing.assert_allclose(scores["rotate_pairs"], scores["rotate_halves"], rtol=1e-4)


def test_rows_go_to_pairs_and_back():
    rows = np.arange(2 * 6).reshape(12, 1)
    assert to_pairs(rows, 2)[:, 0].tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    np.testing.assert_array_equal(from_pairs(to_pairs(rows, 2), 2), rows)
    np.testing.assert_array_equal(halves(to_pairs(rows, 2), 2), rows)


def test_without_the_package_it_is_asked_for(make, tmp_path, monkeypatch):
    made = make(HELD["lora"], "llama", CAUSAL)
    monkeypatch.setitem(sys.modules, "gguf", None)  # as if it were not installed
    text = made.refused(tmp_path / "out", to="gguf-lora")
    assert text == (
        "--to gguf-lora: needs the package gguf; install it with pip install 'jaxpeft[gguf]'"
    )


# --------------------------------------------------------------------------------------- llama.cpp

CONVERTED = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    **{own: name for name, own in NAMES.items()},
}


def write_base(folder: Path, file: Path, architecture: str) -> Path:
    """Write a tiny base as llama.cpp's converter does, without a vocabulary."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(file, architecture)
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(size)
    writer.add_value_length(size)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(size)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    outside = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
    }
    for name, tensor in load_file(folder / "model.safetensors").items():
        module, _, end = name.rpartition(".")
        own = outside.get(module)
        if own is None:
            _, _, layer, inside = module.split(".", 3)
            own = CONVERTED[inside]
            if architecture == "llama" and own in HEADS:
                tensor = to_pairs(tensor, HEADS[own])
            own = f"blk.{layer}.{own}"
        writer.add_tensor(f"{own}.{end}", np.ascontiguousarray(tensor, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("name", ["lora", "ranks and alphas", "outside"])
@pytest.mark.representatives("lora-llama", "outside-qwen3")
def test_llama_cpp_computes_the_adapter_s_logits(make, tmp_path, record_property, kind, name):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    outside = jaxpeft.LoRA(rank=4, targets=("embed_tokens", "lm_head", "k_proj"))
    made = make(outside if name == "outside" else HELD[name], kind, CAUSAL)
    made.export(tmp_path / "out", "gguf-lora")
    architecture = "llama" if kind == "mistral" else kind
    base = write_base(made.base, tmp_path / "base.gguf", architecture)

    def logits(**options):
        # keys and values in float32 (type 0), which are float16 by default
        model = llama_cpp.Llama(
            str(base), logits_all=True, verbose=False, n_ctx=64, type_k=0, type_v=0, **options
        )
        found = []
        for ids, mask in zip(BATCH.ids, BATCH.mask, strict=True):
            model.reset()
            model.eval(ids[mask.astype(bool)].tolist())
            found.append(np.array(model.scores[: mask.sum()]))
        model.close()
        return np.concatenate(found)

    found = logits(lora_path=str(tmp_path / "out" / FILE))
    assert_close(found, made.logits(), 1e-3)  # llama.cpp's products are not all in float32
    assert np.abs(found - logits()).max() > 0.02
    record_property("gap", float(np.abs(found - made.logits()).max()))
