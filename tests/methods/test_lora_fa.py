"""LoRA-FA's own: A is frozen, its input is not kept, and its files are LoRA's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.tree import combine
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.models import build
from jaxpeft.models.base import ModelOptions
from tests.core.helpers import assert_bits, load
from tests.methods.interop import case_of, exported, quiet
from tests.models.conftest import reference, tiny_config  # noqa: F401 - a fixture


@quiet
def test_its_files_are_those_of_lora_and_read_as_lora(reference: Any, tmp_path: Path) -> None:
    method = jaxpeft.LoRAFA(
        rank=4, alpha=6.0, rslora=True, targets="all-linear", init_weights="pissa"
    )
    assert exported(reference, tmp_path, case_of(method, "llama", "LoraConfig")) < 1e-5
    model, base = reference("llama", "causal_lm").load()
    loaded, _ = jaxpeft.load_adapter(tmp_path, model, base)
    assert type(loaded) is jaxpeft.LoRA
    assert loaded.rank == 8


def test_it_begins_as_lora_does_and_trains_b_alone() -> None:
    base = load("llama")[1]
    params = jaxpeft.rewrite(jaxpeft.LoRAFA(rank=4), base, jax.random.key(0))
    assert_bits(params, jaxpeft.rewrite(jaxpeft.LoRA(rank=4), base, jax.random.key(0)))
    mask = jaxpeft.trainable_mask(jaxpeft.LoRAFA(rank=4), params)
    assert {path[-1] for path, flag in paths.walk(mask) if flag} == {"lora_b"}


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.representatives("True")
def test_the_input_of_a_is_not_kept_for_the_backward_pass(scan: bool) -> None:
    config = tiny_config("llama", hidden_size=64, intermediate_size=512, num_hidden_layers=4)
    model = build(
        config, ModelOptions(task="causal_lm", num_labels=None, dtype=jnp.float32, scan_layers=scan)
    )
    ids = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    base = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    kept: dict[str, int] = {}
    for kind in (jaxpeft.LoRA, jaxpeft.LoRAFA):
        method = kind(rank=2, targets=("down_proj",))
        params = jax.eval_shape(
            lambda tree, method=method: jaxpeft.rewrite(method, tree, jax.random.key(0)), base
        )
        trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))

        def loss(trainable: Any, frozen: Any, ids: Any) -> Any:
            return jnp.sum(jnp.square(jaxpeft.apply(model, combine(trainable, frozen), ids)))

        compiled = jax.jit(jax.grad(loss)).lower(trainable, frozen, ids).compile()
        kept[method.name] = compiled.memory_analysis().temp_size_in_bytes
    one = 4 * 64 * 512 * 4  # what one layer's down_proj takes in
    assert kept["lora"] - kept["lora_fa"] > 2 * one


def test_what_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"lora_fa\.lora_plus_ratio: has no effect, since A is not trained"
    ):
        jaxpeft.LoRAFA(lora_plus_ratio=4.0)
    with pytest.raises(
        TargetError, match="which is an embedding site; lora_fa adapts linear sites"
    ):
        jaxpeft.rewrite(
            jaxpeft.LoRAFA(targets=("embed_tokens", "q_proj")), load("llama")[1], jax.random.key(0)
        )
    assert not jaxpeft.LoRAFA.peft.reads(jaxpeft.LoRAFA, {"peft_type": "LORA"})
    with pytest.raises(
        ConfigError,
        match="lora and lora_fa share leaves but train different ones; use only one of them",
    ):
        jaxpeft.Mixed(
            methods=(jaxpeft.LoRA(targets=("q_proj",)), jaxpeft.LoRAFA(targets=("v_proj",)))
        )
    with pytest.raises(
        ConfigError,
        match="two adalora would each wrap the optimizer; combine their sites in one",
    ):
        jaxpeft.Mixed(
            methods=(jaxpeft.AdaLoRA(targets=("q_proj",)), jaxpeft.AdaLoRA(targets=("v_proj",)))
        )
