"""Prefix tuning and deep prompts: the network against torch, starts from real tokens, dropout, what
files leave out.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft import models
from jaxpeft.errors import ConfigError
from jaxpeft.models.base import ModelOptions
from jaxpeft.train.data_start import Start
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import forward, reference, tiny_config  # noqa: F401 - a fixture

FRONT = (7, 8, 9, 10)


def test_the_network_is_that_of_peft() -> None:
    import torch
    from peft import PrefixEncoder, PrefixTuningConfig

    _, base = load("llama")
    method = jaxpeft.PrefixTuning(num_virtual_tokens=5, projection=True, encoder_hidden_size=12)
    leaves = jaxpeft.rewrite(method, base, jax.random.key(0))
    sizes = {"num_virtual_tokens": 5, "token_dim": 16, "num_layers": 2, "num_attention_heads": 2}
    theirs = PrefixEncoder(
        PrefixTuningConfig(**sizes, encoder_hidden_size=12, prefix_projection=True)
    )
    given = {
        "embedding.weight": leaves["prefix_embeddings"],
        "transform.0.weight": leaves["prefix_w1"].T,
        "transform.0.bias": leaves["prefix_b1"],
        "transform.2.weight": leaves["prefix_w2"].reshape(12, -1).T,
        "transform.2.bias": leaves["prefix_b2"].reshape(-1),
    }
    theirs.load_state_dict({name: torch.tensor(np.array(leaf)) for name, leaf in given.items()})
    wanted = theirs(torch.arange(5)).detach().numpy()
    np.testing.assert_allclose(method.table(leaves).reshape(5, -1), wanted, atol=1e-5)


@pytest.mark.parametrize("projection", [False, True])
def test_a_start_at_zero_is_one_of_keys_and_values_of_zero(projection: bool) -> None:
    _, base = load("llama", scan_layers=True)
    method = jaxpeft.PrefixTuning(init_weights="zero", projection=projection)
    table = np.asarray(method.table(jaxpeft.rewrite(method, base, jax.random.key(0))))
    assert table.shape == (20, 2, 2, 16)
    assert not table.any()


# ------------------------------------------------------------------------------- starts from tokens


def build(kind: str, scan: bool, **switches: Any) -> Any:
    options = ModelOptions(task="causal_lm", num_labels=None, dtype=jnp.float32, scan_layers=scan)
    model = models.build(tiny_config(kind, **switches), options)
    tree = jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    rng = np.random.default_rng(1)
    return model, jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.standard_normal(leaf.shape, np.float32), tree
    )


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(
    ("kind", "switches"), [("llama", {}), ("qwen3", {}), ("mistral", {"sliding_window": 6})]
)
@pytest.mark.representatives("llama-*-unrolled")
def test_a_prefix_that_starts_from_tokens_is_the_tokens_in_front_of_the_row(
    kind: str, switches: Any, scan: bool
) -> None:
    model, base = build(kind, scan, **switches)
    method = jaxpeft.PrefixTuning(num_virtual_tokens=6, init_tokens=FRONT)
    run = Start(model, base, jax.random.key(0))
    begun, params = method.start(jaxpeft.rewrite(method, base, jax.random.key(0)), run)
    assert begun == method
    front = np.tile([*FRONT, *FRONT[:2]], (3, 1))  # repeated, the last time in part
    mask = np.concatenate([np.ones_like(front), BATCH.mask], axis=1)
    wanted = forward(model, base, np.concatenate([front, BATCH.ids], axis=1), mask)[:, 6:]
    np.testing.assert_allclose(forward(model, params, BATCH.ids, BATCH.mask), wanted, atol=2e-5)


@pytest.mark.slow
def test_a_classifier_starts_from_the_keys_and_values_of_its_own_layers() -> None:
    method = jaxpeft.PrefixTuning(num_virtual_tokens=4, init_tokens=FRONT)
    made = []
    for scan in (False, True):
        model, base = load("bert", scan_layers=scan)
        made.append(
            method.start(
                jaxpeft.rewrite(method, base, jax.random.key(0)),
                Start(model, base, jax.random.key(0)),
            )[1]
        )
    table = made[0]["prefix_embeddings"]
    np.testing.assert_allclose(table, made[1]["prefix_embeddings"], atol=1e-5)
    bert = load("bert")[1]["bert"]
    x = bert["embeddings"]["word_embeddings"]["embedding"][jnp.asarray(FRONT)]
    x = x + bert["embeddings"]["token_type_embeddings"]["embedding"][0]
    x = x + bert["embeddings"]["position_embeddings"]["embedding"][:4]
    x = x - x.mean(-1, keepdims=True)
    norm = bert["embeddings"]["LayerNorm"]
    x = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-12) * norm["scale"] + norm["bias"]
    key = bert["encoder"]["layer"]["0"]["attention"]["self"]["key"]
    np.testing.assert_allclose(table[:, 0, 0], x @ key["kernel"] + key["bias"], atol=1e-5)


def test_without_tokens_a_start_changes_nothing() -> None:
    model, base = load("llama")
    method = jaxpeft.PrefixTuning()
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    assert method.start(params, Start(model, base, jax.random.key(0))) == (method, params)


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"prefix\.init_tokens: cannot be used with projection"):
        jaxpeft.PrefixTuning(init_tokens=FRONT, projection=True)
    with pytest.raises(
        ConfigError, match=r"prefix\.init_tokens: cannot be used with init_weights 'zero'"
    ):
        jaxpeft.PrefixTuning(init_tokens=FRONT, init_weights="zero")
    with pytest.raises(ConfigError, match=r"prefix\.num_virtual_tokens: must be at least 1, is 0"):
        jaxpeft.PrefixTuning(num_virtual_tokens=0)
    model, base = load("llama")
    method = jaxpeft.PrefixTuning(init_tokens=(3, 99))
    with pytest.raises(ConfigError, match="init_tokens: 99 is outside the vocabulary of 99"):
        method.start(
            jaxpeft.rewrite(method, base, jax.random.key(0)), Start(model, base, jax.random.key(0))
        )


# ------------------------------------------------------------------------------------- deep prompts


@pytest.mark.slow
def test_dropout_acts_on_the_prompts_of_each_row_in_training_only() -> None:
    model, base = load("llama")
    method = jaxpeft.PTuningV2(num_virtual_tokens=5, dropout=0.5)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    plain = dict(params)
    del plain["prefix_dropout"]
    ids = np.tile(BATCH.ids[:1], (2, 1))
    np.testing.assert_array_equal(
        jaxpeft.apply(model, params, ids), jaxpeft.apply(model, plain, ids)
    )
    one, other = jaxpeft.apply(model, params, ids, rngs={"dropout": jax.random.key(0)})
    assert np.abs(one - other).max() > 0.01
    both = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        *({k: params[k] for k in plain | params if "prefix" in k},) * 2,
    )
    rows = jaxpeft.apply(
        model, params | both, ids, rngs={"dropout": jax.random.key(0)}, adapter=jnp.asarray([0, 1])
    )
    np.testing.assert_allclose(rows, jnp.stack([one, other]), atol=2e-5)


@pytest.mark.slow
@quiet
@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.representatives("bert")
def test_deep_prompts_are_saved_as_prefix_tuning_and_read_as_it(
    reference: Any, tmp_path: Any, kind: str
) -> None:
    method = jaxpeft.PTuningV2(num_virtual_tokens=5, projection=True)
    case = case_of(method, kind, "PrefixTuningConfig", num_virtual_tokens=5)
    assert exported(reference, tmp_path, case) < 1e-4
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PREFIX_TUNING"
    )
    model, base = reference(
        kind, "causal_lm" if kind == "llama" else "sequence_classification"
    ).load()
    read, params = jaxpeft.load_adapter(tmp_path, model, base)
    assert read == jaxpeft.PrefixTuning(num_virtual_tokens=5)
    wanted = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    a, b = (forward(model, tree, BATCH.ids, BATCH.mask) for tree in (params, wanted))
    np.testing.assert_allclose(a, b, atol=2e-5)


@quiet
def test_how_a_prefix_began_is_not_read(reference: Any, tmp_path: Any) -> None:
    options = {
        "num_virtual_tokens": 3,
        "prefix_projection": True,
        "encoder_hidden_size": 7,
        "init_weights": "zero",
    }
    gap, method = imported(
        reference, tmp_path, case_of(None, "llama", "PrefixTuningConfig", **options)
    )
    assert gap < 1e-4
    assert method == jaxpeft.PrefixTuning(num_virtual_tokens=3)


@pytest.mark.slow
def test_a_part_of_a_mixed_method_is_read_as_what_its_file_is(tmp_path: Any) -> None:
    model, base = load("bert", scan_layers=True)
    parts = (
        jaxpeft.PrefixTuning(num_virtual_tokens=4, projection=True),
        jaxpeft.LoRA(rank=2, alpha=4.0, init_weights="pissa", targets=("query",)),
    )
    method = jaxpeft.Mixed(methods=parts)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    read, loaded = jaxpeft.load_adapter(tmp_path, model, base)
    plain = (
        jaxpeft.PrefixTuning(num_virtual_tokens=4),
        jaxpeft.LoRA(rank=4, alpha=8.0, targets=("query",)),
    )
    assert read == jaxpeft.Mixed(methods=plain)
    a, b = (forward(model, tree, BATCH.ids, BATCH.mask) for tree in (loaded, params))
    np.testing.assert_allclose(a, b, atol=2e-5)
