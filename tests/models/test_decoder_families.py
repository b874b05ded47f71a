"""The families besides Llama, Mistral and Qwen give the numbers of transformers, switch by switch."""

from __future__ import annotations

from typing import Any

import pytest

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 8,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [1.5, 4.0, 8.0, 16.0],
}
ALTERNATING = ["full_attention", "sliding_attention", "full_attention"]
SLIDING_LAST = ["full_attention", *["sliding_attention"] * 3]
FOUR: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}
LOCAL_AND_GLOBAL = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "yarn", {"rope_parameters": YARN}),
    ("llama", "yarn-amplitude", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    (
        "llama",
        "yarn-blend",
        {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False}},
    ),
    ("llama", "yarn-mscale", {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5}}),
    ("gemma", "plain", {}),
    ("gemma", "untied", {"tie_word_embeddings": False}),
    ("gemma2", "plain", {}),
    ("gemma2", "no-caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", "small-caps", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5}),
    ("gemma2", "layer-types", {"layer_types": ALTERNATING}),
    ("gemma2", "attention-bias", {"attention_bias": True}),
    ("gemma2", "activation", {"hidden_activation": "silu"}),
    ("gemma3_text", "plain", {"num_hidden_layers": 7}),
    ("gemma3_text", "layer-types", {"layer_types": ALTERNATING}),
    ("gemma3_text", "two-bases", {"rope_parameters": LOCAL_AND_GLOBAL, "layer_types": ALTERNATING}),
    ("gemma3_text", "logits-cap", {"final_logit_softcapping": 1.5}),
    ("gemma4_text", "plain", {}),
    ("gemma4_text", "layer-types", {"layer_types": SLIDING_LAST, "num_hidden_layers": 4}),
    ("gemma4_text", "no-shared-keys", FOUR),
    ("gemma4_text", "equal-layers", {"num_kv_shared_layers": 0, "global_head_dim": 8}),
    ("gemma4_text", "narrow", {"use_double_wide_mlp": False, "final_logit_softcapping": None}),
    # with shared keys as well, transformers 5.24 fails
    (
        "gemma4_text",
        "no-layer-embeddings",
        {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0},
    ),
    ("gemma4_text", "biases", {"attention_bias": True, "tie_word_embeddings": False}),
    ("gemma4_text", "for-images", {"use_bidirectional_attention": "vision"}),
    (
        "gemma4_text",
        "keys-as-values",
        {"attention_k_eq_v": True, "num_kv_shared_layers": 0, "num_global_key_value_heads": 4},
    ),
    (
        "gemma4_text",
        "rotations",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0},
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 50.0,
                    "partial_rotary_factor": 0.6,
                    "factor": 1.5,
                },
            }
        },
    ),
    ("gemma4_unified_text", "plain", {}),
    ("gemma4_unified_text", "separate-values", {"attention_k_eq_v": False}),
    ("phi3", "plain", {}),
    ("phi3", "window", {"sliding_window": 4}),
    (
        "phi3",
        "partial",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    ("phi3", "longrope-long", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 8}),
    (
        "phi3",
        "longrope-short",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    ),
    ("ministral3", "plain", {}),
    ("ministral3", "window", {"sliding_window": 4}),
    ("glm4", "plain", {}),
    ("glm4", "no-bias", {"attention_bias": False}),
    (
        "glm4",
        "half",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
            }
        },
    ),
    ("granite", "plain", {}),
    (
        "granite",
        "multipliers",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "attention_multiplier": 0.2,
            "logits_scaling": 2.5,
        },
    ),
    ("granite", "biases", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("olmo2", "plain", {}),
    ("olmo2", "bias", {"attention_bias": True}),
    ("olmo3", "plain", {}),
    (
        "olmo3",
        "yarn",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
                "full_attention": {**YARN, "rope_theta": 5e5},
            }
        },
    ),
    ("gpt_oss", "plain", {}),
    ("gpt_oss", "no-bias", {"attention_bias": False}),
    ("gpt_oss", "no-window", {"sliding_window": 64, "layer_types": ["full_attention"] * 2}),
    ("gpt_oss", "layer-types", {"layer_types": ALTERNATING, "num_hidden_layers": 3}),
    ("gpt_oss", "clamp", {"swiglu_alpha": 1.3, "swiglu_limit": 0.3}),
    ("gpt_oss", "rope", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    (
        "gpt_oss",
        "yarn-short",
        {
            "rope_parameters": {
                **YARN,
                "beta_fast": 4.0,
                "beta_slow": 0.5,
                "truncate": False,
            }
        },
    ),
    ("gpt_oss", "one-expert", {"num_experts_per_tok": 1, "num_local_experts": 5}),
    ("gpt_oss", "all-experts", {"num_experts_per_tok": 4, "tie_word_embeddings": True}),
    ("mixtral", "plain", {}),
    ("mixtral", "window", {"sliding_window": 4}),
    ("mixtral", "one-expert", {"num_experts_per_tok": 1, "num_local_experts": 5}),
    ("qwen3_moe", "plain", {}),
    ("qwen3_moe", "normalized", {"norm_topk_prob": True, "attention_bias": True}),
    ("qwen3_moe", "all-sparse", {"decoder_sparse_step": 1, "num_hidden_layers": 2}),
    ("qwen3_moe", "dense-first", {"decoder_sparse_step": 1, "mlp_only_layers": [0, 1]}),
    ("qwen3_moe", "window", {"use_sliding_window": True, "sliding_window": 4}),
    ("qwen3_moe", "all-experts", {"num_experts_per_tok": 6, "tie_word_embeddings": True}),
    ("glm4_moe", "plain", {}),
    ("glm4_moe", "norms-and-biases", {"use_qk_norm": True, "attention_bias": True}),
    ("glm4_moe", "groups", {"n_group": 2, "topk_group": 1, "n_shared_experts": 2}),
    ("glm4_moe_lite", "plain", {}),
    ("glm4_moe_lite", "named-layers", {"mlp_layer_types": ["sparse", "dense", "sparse"]}),
    ("glm4_moe_lite", "experts-only", {"mlp_layer_types": ["sparse"] * 3}),
    ("deepseek_v3", "plain", {}),
    ("deepseek_v3", "no-query-latent", {"q_lora_rank": None}),
    ("deepseek_v3", "halves-and-biases", {"rope_interleave": False, "attention_bias": True}),
    ("deepseek_v3", "one-group", {"n_group": 1, "topk_group": 1, "norm_topk_prob": False}),
    ("deepseek_v3", "wide-values", {"v_head_dim": 24, "qk_nope_head_dim": 8}),
    ("deepseek_v3", "dense", {"first_k_dense_replace": 3, "rms_norm_eps": 0.05}),
    ("deepseek_v3", "experts-only", {"first_k_dense_replace": 0}),
    (
        "deepseek_v3",
        "yarn",
        {"rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}},
    ),
    ("qwen3_5_text", "plain", {}),
    (
        "qwen3_5_text",
        "layer-types",
        {"layer_types": ["full_attention", "linear_attention"] * 2, "num_hidden_layers": 4},
    ),
    ("qwen3_5_text", "small-eps", {"rms_norm_eps": 1e-6}),
    ("qwen3_5_text", "attention", {"layer_types": ["full_attention"] * 3}),
    ("qwen3_5_text", "biases", {"attention_bias": True, "tie_word_embeddings": True}),
    (
        "qwen3_5_text",
        "sizes",
        {
            "linear_num_key_heads": 3,
            "linear_num_value_heads": 3,
            "linear_conv_kernel_dim": 2,
            "hidden_act": "gelu",
        },
    ),
    ("qwen3_5_text", "one-position", {"linear_conv_kernel_dim": 1}),
    (
        "qwen3_5_text",
        "half",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
                "mrope_section": [2, 1, 1],
                "mrope_interleaved": True,
            }
        },
    ),
    ("smollm3", "plain", {}),
    ("smollm3", "named", {"no_rope_layers": [1, 0, 0, 1]}),
    ("smollm3", "window", {"use_sliding_window": True, "sliding_window": 4}),
    ("smollm3", "biases", {"attention_bias": True, "mlp_bias": True}),
]


@pytest.mark.parametrize(
    ("kind", "switches"), [pytest.param(k, s, id=f"{k}-{n}") for k, n, s in CASES]
)
@pytest.mark.representatives(
    "gemma2-small-caps",
    "gemma4_text-plain",
    "phi3-longrope-long",
    "qwen3_moe-window",
    "deepseek_v3-yarn",
    "granite-multipliers",
)
def test_a_causal_language_model_with_a_switch(parity, kind, switches):
    parity(kind, "causal_lm", **switches)


def hub_sizes(config):
    """Spells the sizes of layers as the configs on the hub do."""
    del config["per_layer_config"]
    config |= {"global_head_dim": 16, "num_global_key_value_heads": 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma4_text", "gemma4_unified_text"])
def test_sizes_of_layers_as_configs_on_the_hub_spell_them(parity, kind):
    parity(kind, "causal_lm", rewrite=hub_sizes)


def as_published(config: dict[str, Any]) -> None:
    """Spell the rotation as the published checkpoints of gpt-oss do."""
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    config |= {"experts_per_token": config["num_experts_per_tok"], "initial_context_length": 8}


@pytest.mark.slow
def test_the_published_spelling_of_gpt_oss_is_read(parity: Any) -> None:
    rope = {**YARN, "truncate": False}
    parity("gpt_oss", "causal_lm", rewrite=as_published, rope_parameters=rope)
