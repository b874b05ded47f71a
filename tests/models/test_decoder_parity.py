"""Decoders give the numbers of transformers, switch by switch."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

import jaxpeft
from tests.models.conftest import PAD, TOLERANCE, make_batch

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 500000.0,
}
SLIDING = {"use_sliding_window": True, "sliding_window": 4}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
ACTS = (
    "gelu",
    "gelu_10",
    "gelu_accurate",
    "gelu_fast",
    "gelu_new",
    "gelu_python",
    "gelu_python_tanh",
    "gelu_pytorch_tanh",
    "hardswish",
    "laplace",
    "leaky_relu",
    "linear",
    "mish",
    "quick_gelu",
    "relu",
    "relu2",
    "relu6",
    "sigmoid",
    "silu",
    "sqrtsoftplus",
    "swish",
    "tanh",
)

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "plain", {}),
    ("llama", "heads-not-shared", {"num_key_value_heads": 4}),
    ("llama", "one-key-head", {"num_key_value_heads": 1}),
    ("llama", "head-dim", {"head_dim": 12}),
    ("llama", "attention-bias", {"attention_bias": True}),
    ("llama", "mlp-bias", {"mlp_bias": True}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "eps", {"rms_norm_eps": 0.1}),
    ("llama", "attention-dropout", {"attention_dropout": 0.5}),
    ("llama", "pretraining-tp", {"pretraining_tp": 2}),
    ("llama", "rope-theta", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    (
        "llama",
        "rope-linear",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    (
        "llama",
        "rope-dynamic-short",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    (
        "llama",
        "rope-dynamic-long",
        {
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
            "max_position_embeddings": 8,
        },
    ),
    ("llama", "rope-llama3", {"rope_parameters": LLAMA3}),
    ("mistral", "window", {"sliding_window": 4}),
    ("mistral", "no-window", {"sliding_window": None}),
    ("mistral", "head-dim", {"head_dim": 12, "sliding_window": 5}),
    ("mistral", "tied", {"tie_word_embeddings": True}),
    ("qwen2", "plain", {}),
    ("qwen2", "tied", {"tie_word_embeddings": True}),
    ("qwen2", "window-all", {**SLIDING, "max_window_layers": 0}),
    ("qwen2", "window-upper", {**SLIDING, "max_window_layers": 1}),
    ("qwen2", "window-none", {**SLIDING, "max_window_layers": 9}),
    (
        "qwen2",
        "window-off",
        {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
    ),
    ("qwen2", "layer-types", {**SLIDING, "layer_types": MIXED, "num_hidden_layers": 3}),
    ("qwen3", "plain", {}),
    ("qwen3", "attention-bias", {"attention_bias": True}),
    ("qwen3", "tied", {"tie_word_embeddings": True}),
    ("qwen3", "window-upper", {**SLIDING, "max_window_layers": 1}),
    ("qwen3", "layer-types", {**SLIDING, "layer_types": MIXED, "num_hidden_layers": 3}),
    (
        "qwen3",
        "rope-linear",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
    ),
]


@pytest.mark.parametrize(
    ("kind", "switches"), [pytest.param(k, s, id=f"{k}-{n}") for k, n, s in CASES]
)
@pytest.mark.representatives(
    "llama-rope-llama3",
    "qwen3-window-upper",
    "llama-one-key-head",
    "llama-tied",
    "mistral-head-dim",
    "llama-mlp-bias",
    "llama-attention-bias",
)
def test_a_causal_language_model_with_a_switch(parity, kind, switches):
    parity(kind, "causal_lm", **switches)


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "encoder"])
@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.representatives("llama-encoder")
def test_the_other_tasks(parity, kind, task):
    parity(kind, task)


def test_the_token_classification_head_without_a_bias(parity, reference):
    parity("llama", "token_classification", token_classification_bias=False)
    _, params = reference("llama", "token_classification", token_classification_bias=False).load()
    assert set(params["score"]) == {
        "kernel"
    }  # a bias would be made newly, as zeros, which no logit would show


def hub_windows(config):
    """Spells windows as the configs on the hub do: transformers saves what it made of them."""
    del config["layer_types"]
    config["sliding_window"] = 4


WINDOWS = [
    {**SLIDING, "max_window_layers": 1, "num_hidden_layers": 3},
    {"use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0},
]


@pytest.mark.parametrize("switches", WINDOWS, ids=["on", "off"])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
@pytest.mark.representatives("qwen2-on")
def test_windows_as_configs_on_the_hub_spell_them(parity, kind, switches):
    parity(kind, "causal_lm", rewrite=hub_windows, **switches)


def old_linear(config):
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}


def old_dynamic(config):
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}


def old_llama3(config):
    del config["rope_parameters"]
    config |= {
        "rope_theta": 500000.0,
        "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    }


def old_plain(config):
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": None}


def both_spellings(config):
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    config["rope_parameters"] = {"rope_type": "linear", "factor": 99.0}


OLD = [
    (old_plain, {"rope_type": "default", "rope_theta": 5000.0}),
    (old_linear, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
    (old_dynamic, {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 5000.0}),
    (old_llama3, LLAMA3),
    (both_spellings, {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("rewrite", "rope"), OLD, ids=[rewrite.__name__ for rewrite, _ in OLD])
@pytest.mark.representatives("old_linear", "old_llama3")
def test_the_older_spelling_of_rope(parity, rewrite, rope):
    parity("llama", "causal_lm", rewrite=rewrite, rope_parameters=rope, max_position_embeddings=8)


def test_position_ids(parity, padded):
    import numpy as np

    positions = np.arange(padded[0].ids.shape[1])[None] + np.array([[0], [5], [40]])
    parity("llama", "causal_lm", inputs={"position_ids": positions.astype(np.int32)})


@pytest.mark.parametrize("act", ACTS)
def test_activations(act):
    import jax.numpy as jnp
    import numpy as np
    import torch
    from transformers.activations import ACT2FN

    from jaxpeft.models.activations import ACTIVATIONS

    x = np.linspace(-12, 12, 97, dtype=np.float32)
    ours, theirs = ACTIVATIONS[act](jnp.asarray(x)), ACT2FN[act](torch.tensor(x)).numpy()
    np.testing.assert_allclose(ours, theirs, atol=2e-6, rtol=2e-6)
    assert ACTIVATIONS[act](jnp.asarray(x, jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("mask", [True, False], ids=["mask", "no mask"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_classifier_reads_the_last_token_that_is_not_padding(reference, side, mask):
    """transformers tells padding by the token: also without a mask, and where the text itself ends
    with that token.
    """
    torch_model = reference("llama", "sequence_classification")
    batch = make_batch(side)
    if mask and side == "right":
        batch.ids[1, 6] = PAD  # pad == eos, and a text that ends in it
    model, params = torch_model.load()
    given = dataclasses.replace(batch, mask=batch.mask if mask else np.ones_like(batch.mask))
    np.testing.assert_allclose(
        jaxpeft.apply(model, params, given.ids, given.mask if mask else None),
        torch_model(given),
        atol=TOLERANCE,
    )


def test_mistral_takes_the_kinds_of_its_layers(reference):
    from transformers import AutoModelForCausalLM

    kinds = ["full_attention", "sliding_attention"]
    made = reference(
        "mistral", "causal_lm", lambda config: config.update(layer_types=kinds), sliding_window=4
    )
    alternating = AutoModelForCausalLM.from_pretrained(
        made.folder
    ).eval()  # another class of transformers
    torch_model = dataclasses.replace(made, model=alternating)
    assert torch_model.difference([make_batch("none")], *torch_model.load()) < TOLERANCE
