"""The families of encoders beside BERT's own: adapters to and from the real peft, exports, quantized
bases, meshes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from benchmarks.strategies import Case, computed, difference, options_of
from jaxpeft.core import paths
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.sharding.mesh_config import MeshConfig
from tests.conformance.conftest import moved
from tests.hub.helpers import assert_bit_equal, peft_load, peft_save, torch_base
from tests.models.conftest import Reference, forward, make_batch, tiny_config

pytestmark = [
    # peft 0.21 asks transformers 5.23 for an attribute that it calls deprecated.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]
TASK = "sequence_classification"
BATCH = make_batch("right")
CLOSE = 1e-4  # of the largest logit
LINEAR = {
    "xlm-roberta": r".*\.(query|output\.dense)",
    "electra": r".*\.(query|output\.dense|embeddings_project)",
    "modernbert": r".*\.(Wqkv|Wi|Wo)",
    "deberta-v2": r".*\.(query_proj|value_proj|output\.dense)",
}
"""Families, and some of their linear sites."""
CONV = {"conv_kernel_size": 3, "share_att_key": False}
METHODS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "lora": (jaxpeft.LoRA(rank=4, alpha=6.0), "LoraConfig", {"r": 4, "lora_alpha": 6}),
    "dora": (
        jaxpeft.DoRA(rank=4, alpha=6.0),
        "LoraConfig",
        {"r": 4, "lora_alpha": 6, "use_dora": True},
    ),
    "prefix": (
        jaxpeft.PrefixTuning(num_virtual_tokens=5),
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5},
    ),
    "prompt": (
        jaxpeft.PromptTuning(num_virtual_tokens=5),
        "PromptTuningConfig",
        {"num_virtual_tokens": 5},
    ),
}
WIDE = {"electra": {"embedding_size": 32}}
"""peft gives its prompts the width of the layers."""
CASES = [
    (kind, name)
    for kind in LINEAR
    for name in METHODS
    # these models take no keys of peft's prefixes
    if not (name == "prefix" and kind in ("modernbert", "deberta-v2"))
]
every_case = pytest.mark.parametrize(("kind", "name"), CASES)


def method_of(kind: str, name: str) -> Any:
    method = METHODS[name][0]
    return dataclasses.replace(method, targets=LINEAR[kind]) if name in ("lora", "dora") else method


def based(reference: Any, kind: str, name: str) -> Any:
    return reference(kind, TASK, **(WIDE.get(kind, {}) if name == "prompt" else {}))


def theirs(torch_model: Any) -> Any:
    return Reference(None, TASK, torch_model)(BATCH)  # pyright: ignore[reportArgumentType]


def ours(model: Any, params: Any) -> Any:
    return np.asarray(forward(model, params, BATCH.ids, BATCH.mask))


def assert_same(found: Any, wanted: Any, plain: Any) -> None:
    assert np.abs(wanted - plain).max() > 0.02, "the adapter changes too little to tell anything"
    assert np.abs(found - wanted).max() <= CLOSE * max(1.0, float(np.abs(wanted).max()))


@every_case
@pytest.mark.representatives("modernbert-lora")
def test_peft_gives_the_logits_of_what_jaxpeft_saved(reference, tmp_path, kind, name):
    torch_model, method = based(reference, kind, name), method_of(kind, name)
    model, base = torch_model.load(scan_layers=True)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    loaded = peft_load(torch_model.folder, TASK, tmp_path)
    assert_same(ours(model, params), theirs(loaded), theirs(torch_model.model))


@every_case
@pytest.mark.slow
def test_jaxpeft_gives_the_logits_of_what_peft_saved(reference, tmp_path, kind, name):
    torch_model = based(reference, kind, name)
    _, config, options = METHODS[name]
    targets = {"target_modules": LINEAR[kind]} if name in ("lora", "dora") else {}
    adapted = peft_save(torch_model.folder, TASK, tmp_path, config=config, **options, **targets)
    wanted, plain = theirs(adapted), theirs(torch_model.model)
    for scan in (False, True):
        model, base = torch_model.load(scan_layers=scan)
        _, params = jaxpeft.load_adapter(tmp_path, model, base)
        assert_same(ours(model, params), wanted, plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["xlm-roberta", "electra", "deberta-v2"])
def test_the_targets_that_peft_chooses_by_itself(reference, tmp_path, kind):
    torch_model = reference(kind, TASK)
    adapted = peft_save(torch_model.folder, TASK, tmp_path)
    model, base = torch_model.load()
    method, params = jaxpeft.load_adapter(tmp_path, model, base)
    assert set(method.targets) == set(adapted.peft_config["default"].target_modules)
    assert_same(ours(model, params), theirs(adapted), theirs(torch_model.model))


@pytest.mark.slow
def test_the_default_targets_of_ia3_are_those_of_peft(reference, tmp_path):
    torch_model = reference("deberta-v2", TASK)
    adapted = peft_save(torch_model.folder, TASK, tmp_path, config="IA3Config")
    model, base = torch_model.load()
    _, params = jaxpeft.load_adapter(tmp_path, model, base)
    fresh = jaxpeft.rewrite(jaxpeft.IA3(), base, jax.random.key(0))
    assert {path for path, _ in paths.walk(fresh)} == {path for path, _ in paths.walk(params)}
    assert_same(ours(model, params), theirs(adapted), theirs(torch_model.model))


@pytest.mark.parametrize(
    ("kind", "switches"),
    [*((kind, {}) for kind in LINEAR), ("deberta-v2", CONV)],
    ids=[*LINEAR, "convolution"],
)
@pytest.mark.parametrize("name", ["lora", "adapter"])
@pytest.mark.representatives("lora-convolution")
@pytest.mark.slow
def test_a_saved_adapter_is_the_same_again_and_merges(reference, tmp_path, kind, name, switches):
    torch_model = reference(kind, TASK, **switches)
    model, base = torch_model.load()
    method = jaxpeft.Adapter(reduction_factor=4) if name == "adapter" else method_of(kind, name)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    assert_bit_equal(jaxpeft.load_adapter(tmp_path / "adapter", model, base)[1], params)
    if name == "adapter":  # which is not linear
        return
    export(ExportRequest(tmp_path / "adapter", "merged", tmp_path / "merged"))
    merged = torch_base(tmp_path / "merged", TASK)
    assert_same(ours(model, params), theirs(merged), theirs(torch_model.model))


PRETRAINED = {
    "xlm-roberta": "XLMRobertaForMaskedLM",
    "electra": "ElectraForPreTraining",
    "modernbert": "ModernBertForMaskedLM",
    "deberta-v2": "DebertaV2ForMaskedLM",
}


@pytest.mark.parametrize("kind", PRETRAINED)
@pytest.mark.representatives("modernbert")
def test_a_checkpoint_of_pretraining_gives_its_backbone(tmp_path, kind):
    import torch
    import transformers

    made = transformers.AutoConfig.for_model(**tiny_config(kind))
    torch.manual_seed(0)
    getattr(transformers, PRETRAINED[kind])(made).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for task in (TASK, "token_classification", "encoder"):
        labels = None if task == "encoder" else 3
        _, params = jaxpeft.load(tmp_path, task=task, num_labels=labels, dtype=jnp.float32)
        read = {paths.hf_names(path)[0] for path, _ in paths.walk(params)}
        for path, leaf in paths.walk(params):
            name = paths.hf_names(path)[0]
            stored = next((t for key, t in tensors.items() if key.endswith(f".{name}")), None)
            stored = tensors.get(name, stored)
            assert stored is not None or paths.is_head(path)
            if stored is not None:
                wanted = stored.T if path[-1] == "kernel" else stored
                np.testing.assert_array_equal(leaf, wanted, err_msg=name)
        if kind == "modernbert" and task != "encoder":
            assert {"head.dense.weight", "head.norm.weight"} <= read & tensors.keys()


@pytest.mark.slow
@pytest.mark.parametrize("task", ["token_classification", "encoder"])
@pytest.mark.parametrize("kind", LINEAR)
def test_other_tasks_merge(reference, tmp_path, kind, task):
    torch_model = reference(kind, task)
    model, base = torch_model.load(scan_layers=True)
    method = method_of(kind, "lora")
    if task == "encoder":
        method = dataclasses.replace(method, targets=LINEAR[kind].replace(r".*\.", r"(.*\.)?"))
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    export(ExportRequest(tmp_path / "adapter", "merged", tmp_path / "merged"))
    merged = Reference(tmp_path, task, torch_base(tmp_path / "merged", task))
    assert merged.difference([BATCH], model, params) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", LINEAR)
def test_an_nf4_base_computes_with_its_rounded_kernels(reference, kind):
    torch_model = reference(kind, TASK)
    model, base = torch_model.load(quant="nf4", scan_layers=True)
    quantized = [path for path, _ in paths.walk(base) if path[-1] == "kernel_nf4"]
    left = {p[-2] for p, _ in paths.walk(base) if p[-1] == "kernel" and not paths.is_head(p)}
    assert quantized and not left

    method = method_of(kind, "lora")
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    merged = jaxpeft.merge(method, jaxpeft.dequantize(params))
    exact, _ = torch_model.load(scan_layers=True)
    np.testing.assert_allclose(ours(model, params), ours(exact, merged), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "tensor", "sequence", "fsdp_tensor"])
@pytest.mark.parametrize("kind", LINEAR)
def test_a_mesh_computes_what_one_device_does(kind, strategy):
    switches: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 8, "vocab_size": 96}
    switches["max_position_embeddings"] = 128
    if kind == "deberta-v2":
        switches |= CONV
    rates = ("hidden_dropout_prob", "attention_probs_dropout_prob")
    architecture = tiny_config(kind, **switches, **dict.fromkeys(rates, 0.0))
    case = Case(architecture, method_of(kind, "lora"), scan=True)
    one = computed(case, MeshConfig(), 1)
    assert difference(one, computed(case, options_of(strategy, 8), 8)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["modernbert", "deberta-v2"])
def test_rows_of_a_batch_use_their_own_adapters(reference, kind):
    model, base = reference(kind, "encoder").load()  # without a head, of which rows would share one
    method = method_of(kind, "lora")
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    each = [moved(method, fresh, seed=seed) for seed in range(2)]
    stack = jaxpeft.bank([(method, params) for params in each])
    which = np.array([1, 0, 1], np.int32)
    found = np.asarray(jaxpeft.apply(model, stack, BATCH.ids, BATCH.mask, adapter=which))
    wanted = np.stack([ours(model, each[own])[row] for row, own in enumerate(which)])
    real = BATCH.mask.astype(bool)
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)


def test_prefix_tuning_of_a_model_without_key_projections_is_refused(reference):
    from jaxpeft.errors import ConfigError

    _, base = reference("modernbert", TASK).load()
    with pytest.raises(ConfigError, match="virtual tokens need keys of one width"):
        jaxpeft.rewrite(jaxpeft.PrefixTuning(), base, jax.random.key(0))
