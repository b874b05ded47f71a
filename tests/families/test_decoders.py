"""Every decoder family does what Llama does: adapters both ways, merged models, quantized bases,
meshes, packed rows, generation and plans.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core.paths import walk
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.models.decoder_families import DECODER_FAMILIES
from jaxpeft.models.masks import positions
from jaxpeft.train import memory
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import peft_load, peft_save, torch_base, trained
from tests.inference.test_generation import MOST, PROMPTS
from tests.inference.test_generation import theirs as generated
from tests.models.conftest import Reference, forward
from tests.representatives import both_stacks

CAUSAL = "causal_lm"
NEW = tuple(kind for kind in DECODER_FAMILIES if kind not in ("llama", "mistral", "qwen2", "qwen3"))
EXPERTS = ("mixtral", "qwen3_moe", "glm4_moe", "gpt_oss")
LATENT = ("glm4_moe_lite", "deepseek_v3")
LINEAR = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
FUSED = ("qkv_proj", "gate_up_proj", "o_proj", "down_proj")
RECURRENT = ("qwen3_5_text",)
"""Families with layers that have no keys."""
GEMMA4 = ("gemma4_text", "gemma4_unified_text")
GLM_EXPERTS = ("glm4_moe", "glm4_moe_lite")
LACKING = {
    "sequence_classification": ("granite", *GEMMA4, *GLM_EXPERTS),
    "token_classification": (
        *("gemma3_text", "granite", "olmo2", "olmo3", "qwen3_5_text"),
        *GEMMA4,
        *GLM_EXPERTS,
    ),
}
"""Families without a class of a task in transformers."""
NO_PREFIX = ("gemma4_unified_text",)
"""Families whose layers have heads that no prefix fits, see test_gemma4."""


def lora_or_dora(test: Any) -> Any:
    """Run a test with LoRA and DoRA on unrolled and scanned layers, one of the four in turn."""
    names = [
        f"{method}-{stack}" for method in ("lora", "dora") for stack in ("unrolled", "scanned")
    ]
    dora = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
    return pytest.mark.alternatives(*names)(both_stacks(dora(test)))


every_family = pytest.mark.parametrize("kind", NEW)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)
Make = Callable[..., Reference]


def targets(kind: str) -> tuple[str, ...]:
    """Return modules of attention and feed-forward, the fused ones where there are some."""
    if kind == "phi3":
        return FUSED
    if kind in LATENT:
        return ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
    if kind in EXPERTS:  # which PEFT adapts as parameters, see test_experts
        return ("q_proj", "v_proj", "o_proj")
    if kind == "qwen3_5_text":
        return (*LINEAR, "q_proj", "k_proj", "o_proj", "gate_proj", "down_proj")
    gate = "gate_up_proj" if kind == "glm4" else "gate_proj"
    return ("q_proj", "v_proj", "o_proj", gate, "down_proj")


@every_family
@lora_or_dora
@pytest.mark.representatives("lora-scanned-phi3")
def test_an_adapter_of_peft_gives_its_logits_and_gradients(
    reference: Make, tmp_path: Path, kind: str, scan: bool, dora: bool
) -> None:
    made = reference(kind, CAUSAL)
    adapter = tmp_path / "adapter"
    torch_model = peft_save(
        made.folder, CAUSAL, adapter, r=4, target_modules=list(targets(kind)), use_dora=dora
    )
    model, base = made.load(scan_layers=scan)
    _, params = jaxpeft.load_adapter(adapter, model, base)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))


@every_family
@lora_or_dora
@pytest.mark.representatives("lora-unrolled-gemma2")
def test_peft_gives_the_logits_of_an_adapter_of_jaxpeft(
    reference: Make, tmp_path: Path, kind: str, scan: bool, dora: bool
) -> None:
    made = reference(kind, CAUSAL)
    model, base = made.load(scan_layers=scan)
    method = (jaxpeft.DoRA if dora else jaxpeft.LoRA)(rank=4, targets=targets(kind))
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    assert_close(
        ours(model, params), theirs(CAUSAL, peft_load(made.folder, CAUSAL, tmp_path / "adapter"))
    )


@pytest.mark.slow
@every_family
@pytest.mark.representatives("gemma3_text")
def test_gradients_of_lora_are_those_of_peft(reference: Make, tmp_path: Path, kind: str) -> None:
    import torch

    made = reference(kind, CAUSAL)
    torch_model = peft_save(
        made.folder, CAUSAL, tmp_path / "a", r=4, target_modules=list(targets(kind))
    )
    model, base = made.load()
    _, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    ids = np.asarray([PROMPTS[2], PROMPTS[2][::-1]], np.int32)

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, params, ids)))

    gradients = jax.jit(jax.grad(loss))(params)
    for name, leaf in torch_model.named_parameters():
        leaf.requires_grad_("lora_" in name)
    torch.mean(torch_model(torch.tensor(ids, dtype=torch.long)).logits ** 2).backward()
    compared = 0
    for name, leaf in torch_model.named_parameters():
        if leaf.grad is None:
            continue
        own = gradients
        steps = name.removeprefix("base_model.model.").removesuffix(".default.weight").split(".")
        for step in steps:
            own = own[step.lower() if step.startswith("lora_") else step]
        wanted = leaf.grad.numpy().T
        assert_close(np.asarray(own), wanted)
        compared += 1
    assert compared == sum("lora_" in name for name, _ in torch_model.named_parameters())
    assert compared == sum(path[-1] in ("lora_a", "lora_b") for path, _ in walk(params))


# PEFT warns of layers that attend to the keys of others, and have no prefix of their own
@pytest.mark.filterwarnings("ignore:Prefix tuning injected into layers:UserWarning")
@pytest.mark.parametrize(
    "kind", [kind for kind in NEW if kind not in (*NO_PREFIX, *LATENT, *RECURRENT)]
)
@both_stacks
@pytest.mark.representatives("scanned-gemma3_text")
def test_prefixes_of_peft_give_its_logits(
    reference: Make, tmp_path: Path, kind: str, scan: bool
) -> None:
    made = reference(kind, CAUSAL)
    torch_model = peft_save(
        made.folder,
        CAUSAL,
        tmp_path / "a",
        config="PrefixTuningConfig",
        num_virtual_tokens=3,
    )
    model, base = made.load(scan_layers=scan)
    _, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))


@every_family
@both_stacks
@pytest.mark.representatives("scanned-olmo2")
def test_a_merged_model_gives_its_logits_in_transformers(
    reference: Make, tmp_path: Path, kind: str, scan: bool
) -> None:
    made = reference(kind, CAUSAL)
    model, base = made.load(scan_layers=scan)
    method = jaxpeft.LoRA(rank=4, targets="all-linear")
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    export(ExportRequest(tmp_path / "a", "merged", tmp_path / "merged"))
    assert_close(theirs(CAUSAL, torch_base(tmp_path / "merged", CAUSAL)), ours(model, params))


@pytest.mark.slow
@every_family
@both_stacks
def test_a_base_in_nf4_computes_as_its_dequantized_weights(
    reference: Make, kind: str, scan: bool
) -> None:
    made = reference(kind, CAUSAL)
    model, params = made.load(scan_layers=scan, quant="nf4")
    plain, exact = made.load(scan_layers=scan)
    assert_close(ours(model, params), ours(plain, jaxpeft.dequantize(params)))
    assert np.abs(ours(model, params) - ours(plain, exact)).max() > 1e-3


@every_family
@both_stacks
@pytest.mark.parametrize("strategy", ["fsdp_tensor", "sequence"])
@pytest.mark.representatives("fsdp_tensor-scanned-phi3")
def test_eight_devices_give_the_logits_of_one(
    reference: Make, kind: str, scan: bool, strategy: str
) -> None:
    made = reference(kind, CAUSAL)
    alone = made.load(scan_layers=scan)
    ids = np.asarray([[*PROMPTS[2], 60, 61, 62]] * 4, np.int32)
    sizes = {"sequence": 4, "data": 2} if strategy == "sequence" else {"tensor": 2, "fsdp": 4}
    config = jaxpeft.MeshConfig(strategy=strategy, **sizes)
    mesh = jaxpeft.create_device_mesh(config)
    model, params = made.load(scan_layers=scan, mesh=mesh, rules=jaxpeft.sharding_rules(config))
    run = jax.jit(jaxpeft.on_mesh(mesh, lambda params, ids: jaxpeft.apply(model, params, ids)))
    assert_close(np.asarray(run(params, ids)), np.asarray(forward(*alone, ids, None)))


@every_family
@both_stacks
@pytest.mark.representatives("scanned-smollm3")
def test_documents_in_one_row_do_not_see_each_other(reference: Make, kind: str, scan: bool) -> None:
    model, params = reference(kind, CAUSAL).load(scan_layers=scan)
    first, second = PROMPTS[2], [60, 61, 62, 63, 64, 65, 66]
    ids = np.asarray([[*first, *second]], np.int32)
    segments = np.asarray([[1] * len(first) + [2] * len(second)], np.int32)
    where = np.asarray(positions(jnp.asarray(segments), *ids.shape))
    packed = forward(model, params, ids, None, {"segment_ids": segments, "position_ids": where})
    for part, rows in ((slice(0, len(first)), first), (slice(len(first), None), second)):
        alone = forward(model, params, np.asarray([rows], np.int32), None)
        assert_close(np.asarray(packed)[:, part], np.asarray(alone))


@every_family
@pytest.mark.representatives("gemma4_text")
def test_the_activations_of_layers_are_estimated_one_by_one(reference: Make, kind: str) -> None:
    outlined = outline(reference(kind, CAUSAL).folder, ModelRequest(CAUSAL))
    kept = memory.estimate(outlined, 0, 2, 16).kept
    assert 0 < kept["full"] < kept["attention"] < kept["products"]


@every_family
@pytest.mark.representatives("gemma2")
def test_greedy_tokens_are_those_of_transformers(reference: Make, kind: str) -> None:
    made = reference(kind, CAUSAL)
    wanted = generated(made.model, PROMPTS)
    for scan in (False, True):
        model, params = made.load(scan_layers=scan)
        assert jaxpeft.generate(model, params, PROMPTS, max_new_tokens=MOST, eos=()) == wanted


@every_family
@pytest.mark.slow
@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "encoder"])
def test_the_other_tasks(parity: Any, kind: str, task: str) -> None:
    if kind in LACKING.get(task, ()):
        pytest.skip("transformers has no such class")
    parity(kind, task)
