"""LoRA of experts that are parameters in transformers: in the files that PEFT writes and reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import AdapterError
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import assert_bit_equal, peft_load, peft_save, trained
from tests.models.conftest import Reference, make_batch

CAUSAL, KIND = "causal_lm", "gpt_oss"
ALL = ("mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.router.weight")
Make = Callable[..., Reference]


def saved(made: Reference, folder: Path, method: Any) -> Any:
    """Save a trained adapter; return the model, the base, and the rewritten tree."""
    model, base = made.load(scan_layers=True)
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(folder, method, params, model)
    return model, base, params


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize(
    ("options", "modules", "parameters"),
    [
        ({"targets": ("gate_up_proj", "down_proj")}, [], list(ALL[:2])),
        ({"targets": ("q_proj", "down_proj", "router")}, ["q_proj"], [ALL[0], ALL[2]]),
        (
            {"targets": "all-linear", "rslora": True},
            [f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "kqov"],
            list(ALL[:2]),
        ),
        (
            {"targets": ("v_proj", "down_proj"), "layers_to_transform": (1,)},
            ["model.layers.1.self_attn.v_proj"],
            [f"model.layers.1.{ALL[0]}"],
        ),
    ],
    ids=["experts", "router", "all-linear", "one layer"],
)
@pytest.mark.representatives("experts")
def test_parameters_are_named_and_peft_gives_the_logits(
    reference: Make,
    tmp_path: Path,
    options: dict[str, Any],
    modules: list[str],
    parameters: list[str],
) -> None:
    made = reference(KIND, CAUSAL)
    model, base, params = saved(made, tmp_path / "a", jaxpeft.LoRA(rank=4, **options))
    config = config_of(tmp_path / "a")
    assert sorted(config["target_modules"]) == sorted(modules)
    assert config["target_parameters"] == parameters
    assert_close(
        ours(model, params), theirs(CAUSAL, peft_load(made.folder, CAUSAL, tmp_path / "a"))
    )
    _, again = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, again), ours(model, params))


@pytest.mark.slow
def test_the_tensors_are_those_that_peft_writes(reference: Make, tmp_path: Path) -> None:
    made = reference(KIND, CAUSAL)
    torch_model = peft_save(
        made.folder, CAUSAL, tmp_path / "a", r=3, target_modules=[], target_parameters=[*ALL]
    )
    model, base = made.load()
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))
    jaxpeft.save_adapter(tmp_path / "b", method, params, model)
    wanted, found = (load_file(tmp_path / n / "adapter_model.safetensors") for n in "ab")
    assert_bit_equal(found, wanted)


@pytest.mark.slow
def test_gradients_of_factors_are_those_of_peft(reference: Make, tmp_path: Path) -> None:
    import torch

    made, ids = reference(KIND, CAUSAL), make_batch("none").ids
    torch_model = peft_save(
        made.folder, CAUSAL, tmp_path / "a", r=3, target_modules=[], target_parameters=[*ALL]
    )
    model, base = made.load()
    method, params = jaxpeft.load_adapter(tmp_path / "a", model, base)

    def loss(params: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, params, ids)))

    gradients = jax.jit(jax.grad(loss))(params)
    factors = paths.map_with_path(
        lambda path, leaf: leaf if path[-1] in ("lora_a", "lora_b") else paths.get(params, path),
        gradients,
    )
    jaxpeft.save_adapter(tmp_path / "b", method, factors, model)
    own = load_file(tmp_path / "b" / "adapter_model.safetensors")
    for name, leaf in torch_model.named_parameters():
        leaf.requires_grad_("lora_" in name)
    torch.mean(torch_model(torch.tensor(ids, dtype=torch.long)).logits ** 2).backward()
    compared = 0
    for name, leaf in torch_model.named_parameters():
        if leaf.grad is not None:
            assert_close(own[name.replace(".default", "")], leaf.grad.numpy())
            compared += np.abs(leaf.grad.numpy()).max() > 1e-4
    assert compared == 2 * len(ALL) * made.model.config.num_hidden_layers


@pytest.mark.slow
def test_what_peft_shares_between_experts_must_be_equal(reference: Make, tmp_path: Path) -> None:
    made = reference(KIND, CAUSAL)
    some = jaxpeft.LoRA(rank=2, targets=r".*\.experts\.[01]\.down_proj")
    with pytest.raises(AdapterError, match=r"down_proj: only 2 of 4 experts are adapted, but PEFT"):
        saved(made, tmp_path / "a", some)
    ranks = jaxpeft.LoRA(rank=2, targets=("q_proj", "down_proj"), rank_pattern={"down_proj": 3})
    with pytest.raises(
        AdapterError, match=r"rank_pattern: 'down_proj' matches .*one rank and alpha"
    ):
        saved(made, tmp_path / "a", ranks)
    other = jaxpeft.LoRA(rank=2, targets=("q_proj", "down_proj"), rank_pattern={"q_proj": 3})
    saved(made, tmp_path / "a", other)
    assert config_of(tmp_path / "a")["rank_pattern"] == {"q_proj": 3}


@pytest.mark.slow
def test_other_methods_keep_the_names_of_modules(reference: Make, tmp_path: Path) -> None:
    method = jaxpeft.DoRA(rank=2, targets=("down_proj",))
    model, base, params = saved(reference(KIND, CAUSAL), tmp_path / "a", method)
    assert not config_of(tmp_path / "a").get("target_parameters")
    _, again = jaxpeft.load_adapter(tmp_path / "a", model, base)
    assert_close(ours(model, again), ours(model, params))
