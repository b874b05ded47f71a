"""Gemma 4: what its unequal layers, shared keys and per-layer embeddings mean for the rest."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import ConfigError
from jaxpeft.models.kv_cache import KEYS, read_layers
from jaxpeft.train.data_start import Start
from tests.export.making import assert_close, ours
from tests.hub.helpers import edited
from tests.models.conftest import Reference, make_batch

CAUSAL = "causal_lm"
Make = Callable[..., Reference]


@pytest.fixture
def base(reference: Make) -> tuple[Any, Any]:
    """Return a tiny model with its parameters."""
    return reference("gemma4_text", CAUSAL).load()


@pytest.mark.slow
def test_layers_that_share_keys_have_none(base: tuple[Any, Any]) -> None:
    model, params = base
    layers = params["model"]["layers"]
    assert {*layers["2"]["self_attn"]} >= {"q_proj", "q_norm", "k_proj", "k_norm", "v_proj"}
    assert {*layers["3"]["self_attn"]} == {"q_proj", "q_norm", "o_proj"}
    assert layers["4"]["mlp"]["up_proj"]["kernel"].shape == (32, 96)
    _, sown = jaxpeft.apply(model, params, make_batch("none").ids, mutable=["past"])
    assert [own[KEYS].shape[-1] for own in read_layers(sown["past"]).values()] == [8, 16, 8]


@pytest.mark.slow
def test_keys_that_no_layer_uses_are_left_in_the_checkpoint(
    reference: Make, tmp_path: Path
) -> None:
    made = reference("gemma4_text", CAUSAL)

    def add(tensors: dict[str, Any]) -> None:
        for name in ("k_proj", "v_proj", "k_norm", "v_norm"):
            tensors[f"model.layers.4.self_attn.{name}.weight"] = np.ones((4, 4), np.float32)

    folder = edited(made.folder, tmp_path / "model", add)
    model, params = jaxpeft.load(folder, task=CAUSAL, dtype="float32")
    assert_close(ours(model, params), ours(*made.load()), 0)


def test_the_numbers_of_layers_are_not_trained(base: tuple[Any, Any]) -> None:
    mask = dict(paths.walk(trainable_mask(jaxpeft.Full(), base[1])))
    frozen = {path[-1] for path, flag in mask.items() if not flag}
    assert frozen == {"layer_scalar"}


@pytest.mark.parametrize(
    "method", [jaxpeft.PromptTuning(), jaxpeft.PTuning()], ids=lambda m: m.name
)
def test_a_prompt_has_no_embeddings_for_each_layer(base: tuple[Any, Any], method: Any) -> None:
    text = r"every layer embeds the tokens \(model/embed_tokens_per_layer\), but virtual tokens"
    with pytest.raises(ConfigError, match=text):
        jaxpeft.rewrite(method, base[1], jax.random.key(0))


@pytest.mark.slow
def test_a_prompt_of_a_model_without_them_is_computed(reference: Make) -> None:
    model, params = reference("gemma4_unified_text", CAUSAL).load()
    method = jaxpeft.PromptTuning(num_virtual_tokens=4, init_tokens=(7, 8, 9, 10))
    prompted = jaxpeft.rewrite(method, params, jax.random.key(0))
    batch = make_batch("none")
    front = np.tile(np.asarray([[7, 8, 9, 10]], np.int32), (len(batch.ids), 1))
    # a prompt is not scaled, as the embeddings of tokens are
    prompted["prompt_embeddings"] = prompted["prompt_embeddings"] * jnp.sqrt(32.0)
    whole = jaxpeft.apply(model, params, np.concatenate([front, batch.ids], axis=1))
    assert_close(np.asarray(jaxpeft.apply(model, prompted, batch.ids)), np.asarray(whole)[:, 4:])


def test_a_prefix_fits_no_layers_with_more_heads_than_the_widest(reference: Make) -> None:
    _, params = reference("gemma4_unified_text", CAUSAL).load()
    text = "layers have 2 key heads of size 8 and 1 of size 16; virtual tokens need layers with no"
    with pytest.raises(ConfigError, match=text):
        jaxpeft.rewrite(jaxpeft.PrefixTuning(), params, jax.random.key(0))


@pytest.mark.slow
def test_a_prefix_of_unequal_layers_starts_from_no_tokens(base: tuple[Any, Any]) -> None:
    model, params = base
    method = jaxpeft.PrefixTuning(num_virtual_tokens=2, init_tokens=(7, 8))
    fresh = jaxpeft.rewrite(method, params, jax.random.key(0))
    with pytest.raises(ConfigError, match="init_tokens: layers have keys of different sizes"):
        method.start(fresh, Start(model, params, jax.random.key(0)))


def test_tokens_cannot_be_added(reference: Make) -> None:
    text = r"vocab_size: 101 adds tokens, which have no embeddings for each layer \(embed_tokens_p"
    with pytest.raises(ConfigError, match=text):
        reference("gemma4_text", CAUSAL).load(vocab_size=101)
