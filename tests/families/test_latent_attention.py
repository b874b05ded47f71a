"""What only DeepSeek-V3 and its kind have: latent attention, a bias of the choice of experts, and
layers that predict further tokens.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.tree import CORRECTION
from jaxpeft.errors import ConfigError, TargetError, WeightsError
from jaxpeft.export.export import ExportRequest, export
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import peft_load, peft_save, torch_base, trained
from tests.models.conftest import Reference, forward, make_batch

CAUSAL, KIND = "causal_lm", "deepseek_v3"
Make = Callable[..., Reference]
BIAS = ("model", "layers", "1", "mlp", "gate", CORRECTION)


@pytest.mark.slow
def test_the_bias_of_the_choice_changes_which_experts_compute(reference: Make) -> None:
    model, params = reference(KIND, CAUSAL).load()
    flat = paths.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if path[-1] == CORRECTION else leaf, params
    )
    assert float(jnp.abs(paths.get(params, BIAS)).max()) > 0.1
    assert np.abs(ours(model, flat) - ours(model, params)).max() > 1e-3


@pytest.mark.parametrize(
    "method",
    [jaxpeft.Full(), jaxpeft.Freeze(layers=2), jaxpeft.BitFit(), jaxpeft.Head()],
    ids=lambda method: method.name,
)
@pytest.mark.representatives("full")
def test_no_method_trains_the_bias_of_the_choice(reference: Make, method: Any) -> None:
    _, base = reference(KIND, "sequence_classification").load()
    mask = trainable_mask(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    on = {path: flag for path, flag in paths.walk(mask) if path[-1] == CORRECTION}
    assert len(on) == 2 and not any(on.values())


@pytest.mark.slow
def test_the_bias_of_the_choice_keeps_its_dtype(reference: Make, tmp_path: Path) -> None:
    made = reference(KIND, CAUSAL)
    _, exact = made.load()
    model, params = made.load(dtype=jnp.bfloat16)
    assert paths.get(params, (*BIAS[:-1], "kernel")).dtype == jnp.bfloat16
    assert paths.get(params, BIAS).dtype == jnp.float32
    np.testing.assert_array_equal(paths.get(params, BIAS), paths.get(exact, BIAS))
    method = jaxpeft.LoRA(rank=2, targets=("o_proj",))
    adapted = trained(method, jaxpeft.rewrite(method, params, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, adapted, model)
    export(ExportRequest(tmp_path / "a", "merged", tmp_path / "merged", dtype="bfloat16"))
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_array_equal(
        saved[f"model.layers.1.mlp.gate.{CORRECTION}"], paths.get(exact, BIAS)
    )


@pytest.mark.slow
def test_layers_that_predict_further_tokens_are_left_out(reference: Make, tmp_path: Path) -> None:
    made = reference(KIND, CAUSAL)
    folder = tmp_path / "published"
    shutil.copytree(made.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    later = {
        name.replace("layers.2.", "layers.3."): tensor
        for name, tensor in tensors.items()
        if "layers.2." in name
    }
    later["model.layers.3.eh_proj.weight"] = np.zeros((4, 4), np.float32)
    save_file({**tensors, **later}, folder / "model.safetensors")
    published = Reference(folder, CAUSAL, made.model)
    assert_close(ours(*published.load()), ours(*made.load()))
    config = json.loads((folder / "config.json").read_text())
    config["num_nextn_predict_layers"] = 0
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=r"extra: model\.layers\.3\.eh_proj\.weight is not part"):
        published.load()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KIND, "glm4_moe_lite"])
def test_blocks_of_keys_give_the_logits_of_the_whole(reference: Make, kind: str) -> None:
    batch = make_batch("right")
    outputs = [
        np.asarray(forward(*reference(kind, CAUSAL).load(attention=name), batch.ids, batch.mask))
        for name in ("chunked", "xla")
    ]
    real = batch.mask.astype(bool)
    assert_close(outputs[0][real], outputs[1][real])


def test_a_prefix_is_refused(reference: Make) -> None:
    _, base = reference(KIND, CAUSAL).load()
    with pytest.raises(
        ConfigError, match=r"which may have different sizes, from one vector \(kv_b_proj\); PEFT's"
    ):
        jaxpeft.rewrite(jaxpeft.PrefixTuning(num_virtual_tokens=3), base, jax.random.key(0))


@pytest.mark.slow
def test_prompts_compute_as_their_tokens(reference: Make) -> None:
    model, base = reference(KIND, CAUSAL).load()
    tokens = (5, 6, 7)
    method = jaxpeft.PromptTuning(num_virtual_tokens=3, init_tokens=tokens)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    table = base["model"]["embed_tokens"]["embedding"][jnp.asarray(tokens)]
    params |= {name: table for name in params.keys() - base.keys() if params[name].ndim == 2}
    ids = make_batch("none").ids
    longer = np.concatenate([np.tile(np.asarray(tokens, np.int32), (len(ids), 1)), ids], axis=1)
    wanted = np.asarray(forward(model, base, longer, None))[:, 3:]
    assert_close(np.asarray(forward(model, params, ids, None)), wanted)


@pytest.mark.slow
def test_saving_says_what_peft_does_not_load(
    reference: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, base = reference(KIND, CAUSAL).load()
    said = "exclude mlp.up_proj, shared_experts.up_proj"
    for targets, warned in ((("up_proj",), True), (("o_proj",), False)):
        caplog.clear()
        method = jaxpeft.LoRA(rank=2, targets=targets)
        params = jaxpeft.rewrite(method, base, jax.random.key(0))
        with caplog.at_level("WARNING", "jaxpeft"):
            jaxpeft.save_adapter(tmp_path / targets[0], method, params, model)
        assert (said in caplog.text) is warned


@pytest.mark.slow
def test_other_methods_of_peft_adapt_shared_experts(reference: Make, tmp_path: Path) -> None:
    made = reference(KIND, CAUSAL)
    model, base = made.load()
    method = jaxpeft.LoHa(rank=2, targets=("shared_experts.up_proj", "kv_b_proj"))
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    loaded = theirs(CAUSAL, peft_load(made.folder, CAUSAL, tmp_path / "a"))
    assert_close(ours(model, params), loaded)
    assert np.abs(loaded - theirs(CAUSAL, torch_base(made.folder, CAUSAL))).max() > 1e-3


@pytest.mark.slow
def test_a_router_trained_in_full_fits_peft_both_ways(reference: Make, tmp_path: Path) -> None:
    made, saved = reference(KIND, CAUSAL), ("mlp.gate",)
    model, base = made.load()
    torch_model = peft_save(
        made.folder, CAUSAL, tmp_path / "a", r=4, target_modules=["o_proj"], modules_to_save=saved
    )
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))
    params = trained(method, params)
    jaxpeft.save_adapter(tmp_path / "b", method, params, model)
    assert_close(
        theirs(CAUSAL, peft_load(made.folder, CAUSAL, tmp_path / "b")), ours(model, params)
    )


@pytest.mark.slow
def test_bottlenecks_are_not_only_in_the_layers_without_experts(reference: Make) -> None:
    _, base = reference(KIND, CAUSAL).load()
    with pytest.raises(TargetError, match=r"sublayers: 'feed_forward' adapts feed-forwards, but"):
        jaxpeft.rewrite(jaxpeft.Adapter(), base, jax.random.key(0))


@pytest.mark.slow
@pytest.mark.parametrize("exclude", [None, ["lm_head"], ".*lm_head"], ids=["none", "list", "text"])
def test_parameters_of_experts_are_not_those_of_modules_beside_them(
    reference: Make, tmp_path: Path, exclude: Any
) -> None:
    made, names = reference(KIND, CAUSAL), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    peft_save(
        made.folder, CAUSAL, tmp_path, r=4, target_modules=["o_proj"], target_parameters=names
    )
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "exclude_modules": exclude}))
    model, base = made.load()
    _, params = jaxpeft.load_adapter(tmp_path, model, base)
    adapted = {path[-2:-1] + path[3:5] for path, _ in paths.walk(params) if path[-1] == "lora_a"}
    assert adapted == {
        ("o_proj", "self_attn", "o_proj"),
        *((name, "mlp", "experts") for name in ("gate_proj", "up_proj", "down_proj")),
    }
