"""Adapter folders: what is written, that it comes back bit for bit, and what is refused."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import AdapterError, ConfigError
from jaxpeft.methods import METHODS
from jaxpeft.methods.lora import LoRA
from tests.hub.helpers import METHOD, QUERY, assert_bit_equal, edit_json, trained

CAUSAL, SEQUENCE = "causal_lm", "sequence_classification"
FILES = {"adapter_config.json", "adapter_model.safetensors", "jaxpeft.json", "README.md"}
# ----------------------------------------------------------------------------------- there and back

ROUND_TRIPS = {
    "lora": ("bert", SEQUENCE, METHOD, {}),
    "patterns": (
        "llama",
        CAUSAL,
        LoRA(targets=("q_proj",), rank_pattern={"0.self_attn.q_proj": 2}, rslora=True),
        {},
    ),
    "layers": ("llama", CAUSAL, LoRA(targets=("q_proj",), layers_to_transform=(1,)), {}),
    "whole modules": (
        "llama",
        CAUSAL,
        LoRA(targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head")),
        {},
    ),
    "all biases": ("roberta", SEQUENCE, LoRA(targets=("query",), bias="all"), {}),
    "dropout": ("distilbert", SEQUENCE, LoRA(targets=("q_lin",), dropout=0.25), {}),
    "bfloat16 base": ("bert", SEQUENCE, METHOD, {"dtype": jnp.bfloat16}),
    "bitfit": ("bert", SEQUENCE, METHODS["bitfit"](), {}),
    "head": ("bert", SEQUENCE, METHODS["head"](modules_to_save=("pooler",)), {}),
    "full": ("llama", SEQUENCE, METHODS["full"](), {}),
}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("kind", "task", "method", "options"), ROUND_TRIPS.values(), ids=ROUND_TRIPS
)
@pytest.mark.representatives("*-scanned")
def test_saving_and_loading_gives_the_same_bits(save, kind, task, method, options, scan):
    saved = save(method, kind, task, scan_layers=scan, **options)
    found, params = saved.load()
    assert found == method
    assert_bit_equal(params, saved.params)


@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.representatives("all")
def test_scanned_and_unrolled_layers_share_their_adapters(save, bias):
    method = LoRA(
        rank=4, targets=("query", "dense"), rank_pattern={"0.attention.self.query": 2}, bias=bias
    )
    saved = save(method)
    _, stacked = saved.load(scan_layers=True)
    first = stacked["bert"]["encoder"]["layer"]["attention"]["self"]["query"]
    np.testing.assert_array_equal(first["lora_a"][0, :, 2:], 0)
    model, base = jaxpeft.load(
        saved.model.source.folder, task=SEQUENCE, dtype=jnp.float32, scan_layers=True
    )
    jaxpeft.save_adapter(saved.folder, method, stacked, model)
    assert_bit_equal(saved.load()[1], saved.params)
    assert_bit_equal(jaxpeft.load_adapter(saved.folder, model, base)[1], stacked)


def test_a_stacked_bias_is_not_trained_for_some_of_its_layers(save):
    with pytest.raises(
        ConfigError,
        match=r"key/bias is one stacked leaf, but only 1 of its 2 layers are to be trained",
    ):
        save(LoRA(targets=("key",), bias="lora_only", layers_to_transform=(0,)), scan_layers=True)


def test_an_adapter_stays_float32_on_a_bfloat16_base(save):
    _, params = save().load(dtype=jnp.bfloat16)
    query = params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    assert {name: str(leaf.dtype) for name, leaf in query.items()} == {
        "kernel": "bfloat16",
        "bias": "bfloat16",
        "lora_a": "float32",
        "lora_b": "float32",
        "lora_scale": "float32",
    }


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_an_adapter_in_half_precision_is_widened(save, dtype):
    saved = save()
    saved.edit(
        lambda tensors: tensors.update(
            {name: tensor.astype(dtype) for name, tensor in tensors.items()}
        )
    )
    edit_json(saved.folder / "jaxpeft.json", lambda extra: extra.pop("sha256"))
    _, params = saved.load()
    wanted = paths.get(saved.params, ("classifier", "kernel")).astype(dtype).astype(jnp.float32)
    assert_bit_equal({"kernel": params["classifier"]["kernel"]}, {"kernel": wanted})


# ---------------------------------------------------------------------------------- what is written


def test_the_folder_holds_the_adapter_and_never_the_base(save):
    saved = save(labels=("no", "maybe", "yes"))
    assert {file.name for file in saved.folder.iterdir()} == FILES
    tensors = load_file(saved.folder / "adapter_model.safetensors")
    sites = [
        f"{QUERY[:-5]}{name}".replace("layer.0", f"layer.{i}")
        for name in ("query", "value")
        for i in (0, 1)
    ]
    wanted = {f"{site}.lora_{ab}.weight" for site in sites for ab in "AB"}
    assert tensors.keys() == wanted | {
        f"base_model.model.classifier.{leaf}" for leaf in ("weight", "bias")
    }
    assert tensors[f"{QUERY}.lora_A.weight"].shape == (4, 32) and tensors[
        f"{QUERY}.lora_B.weight"
    ].shape == (32, 4)
    config = json.loads((saved.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == saved.model.source.name
    assert (config["task_type"], config["modules_to_save"], config["inference_mode"]) == (
        "SEQ_CLS",
        ["classifier"],
        True,
    )
    extra = json.loads((saved.folder / "jaxpeft.json").read_text())
    assert (extra["labels"], extra["num_labels"], extra["task"]) == (
        ["no", "maybe", "yes"],
        3,
        SEQUENCE,
    )
    assert len(extra["base_sha256"]) == 64


def test_a_trained_leaf_that_is_not_finite_is_not_saved(save, tmp_path):
    saved = save()
    query = saved.params["bert"]["encoder"]["layer"]["0"]["attention"]["self"]["query"]
    query["lora_b"] = query["lora_b"].at[1, 2].set(jnp.nan)
    saved.params["classifier"]["bias"] = saved.params["classifier"]["bias"].at[0].set(-jnp.inf)
    with pytest.raises(AdapterError) as caught:
        jaxpeft.save_adapter(tmp_path / "new", METHOD, saved.params, saved.model)
    names = [f"{QUERY}.lora_B.weight", "base_model.model.classifier.bias"]
    assert sorted(caught.value.problems) == [
        f"{tmp_path / 'new'}: {n} contains NaN or infinity; not saved" for n in names
    ]
    assert not list((tmp_path / "new").glob("*"))


def test_saving_again_replaces_the_files_whole(save, monkeypatch):
    saved = save()
    before = (saved.folder / "adapter_model.safetensors").read_bytes()
    changed = trained(METHOD, saved.params, seed=1)

    def fail(tensors, file):
        file.write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("jaxpeft.hub.adapters.save.write_arrays", fail)
        with pytest.raises(OSError, match="no space left"):
            jaxpeft.save_adapter(saved.folder, METHOD, changed, saved.model)
    assert (saved.folder / "adapter_model.safetensors").read_bytes() == before
    jaxpeft.save_adapter(saved.folder, METHOD, changed, saved.model)
    assert {file.name for file in saved.folder.iterdir()} == FILES
    assert_bit_equal(saved.load()[1], changed)
