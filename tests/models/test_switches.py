"""What a config asks for and jaxpeft does not have is refused by name, all at once."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import models
from jaxpeft.errors import ConfigError
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.composite import TEXT_MODELS
from tests.models.test_encoder_parity import ENCODERS


def build(config: dict[str, Any], task: str = "encoder", **options: Any) -> Any:
    return models.build(
        config,
        ModelOptions(
            task=task, num_labels=options.pop("num_labels", None), dtype=jnp.float32, **options
        ),
    )


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "llama",
        {"rope_scaling": {"type": "su", "factor": 4.0}},
        (
            "rope_scaling: rope_type 'su' is not supported (supported: default, linear, dynamic,"
            " llama3, yarn, longrope, proportional)"
        ),
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
        "rope_parameters: short_factor: must be a list of 4 numbers, is None",
    ),
    (
        "llama",
        {"rope_parameters": {"full_attention": {"rope_type": "yarn"}}},
        (
            "rope_parameters: separate settings for full_attention are not supported (supported:"
            " one for all layers)"
        ),
    ),
    (
        "llama",
        {"rope_scaling": {"type": "linear"}},
        "rope_scaling: factor: must be a positive number, is None",
    ),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling: must be a mapping, is 'linear'"),
    ("llama", {"rope_theta": 0}, "rope_theta: must be a positive number, is 0"),
    (
        "llama",
        {"partial_rotary_factor": 0.5},
        "rope_parameters: partial_rotary_factor 0.5 is not supported (supported: 1)",
    ),
    (
        "llama",
        {"quantization_config": {"bits": 4}},
        "quantization_config: {'bits': 4} is not supported: load the unquantized model",
    ),
    (
        "deepseek_v3",
        {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        (
            "quantization_config: {'quant_method': 'fp8', 'weight_block_size': [128, 128]} is not"
            " supported: each block of [128, 128] weights has a scale of its own"
            " (weight_scale_inv), but the format fp8 has one scale for each output, which cannot"
            " hold them exactly; load the weights converted to bfloat16, with quant='fp8' or 'nf4'"
            " if they are too large"
        ),
    ),
    (
        "deepseek_v3",
        {"num_key_value_heads": 2},
        "num_key_value_heads: is 2, but each of the 4 num_attention_heads has its own keys in",
    ),
    (
        "deepseek_v3",
        {"qk_rope_head_dim": 7},
        "qk_rope_head_dim: must be even for rotary embeddings, is 7",
    ),
    (
        "deepseek_v3",
        {"n_group": 3},
        "n_group: is 3, but 8 experts cannot be divided into so many groups of at least 2",
    ),
    ("deepseek_v3", {"topk_group": 5}, "topk_group: is 5, but n_group is 4"),
    (
        "deepseek_v3",
        {"num_experts_per_tok": 5},
        "num_experts_per_tok: is 5, but 2 groups (topk_group) have only 4 experts",
    ),
    (
        "deepseek_v3",
        {"scoring_func": "softmax"},
        "scoring_func: 'softmax' is not supported (supported: sigmoid)",
    ),
    (
        "deepseek_v3",
        {"topk_method": "greedy"},
        "topk_method: 'greedy' is not supported (supported: noaux_tc)",
    ),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: 2 is not supported (supported: 1)"),
    (
        "glm4_moe_lite",
        {"mlp_layer_types": ["dense", "sparse"]},
        "mlp_layer_types: ['dense', 'sparse'] is not supported (supported: dense or sparse, 3",
    ),
    (
        "glm4_moe_lite",
        {"first_k_dense_replace": 2},
        "first_k_dense_replace: has no effect; set mlp_layer_types instead",
    ),
    (
        "llama",
        {"hidden_act": "prelu"},
        "hidden_act: 'prelu' is not supported (supported: gelu, gelu_10,",
    ),
    (
        "llama",
        {"hidden_act": ["silu"]},
        "hidden_act: ['silu'] is not supported (supported: gelu, gelu_10,",
    ),
    (
        "llama",
        {"num_attention_heads": 0},
        "num_attention_heads: must be an integer of at least 1, is 0",
    ),
    (
        "llama",
        {"num_key_value_heads": 3},
        "num_key_value_heads: 3 does not divide num_attention_heads 4",
    ),
    (
        "llama",
        {"num_key_value_heads": "two"},
        "num_key_value_heads: must be an integer of at least 1, is 'two'",
    ),
    ("llama", {"hidden_size": 30}, "num_attention_heads: 4 does not divide hidden_size 30"),
    ("llama", {"hidden_size": None}, "hidden_size: must be an integer of at least 1, is None"),
    ("llama", {"head_dim": 7}, "head_dim: must be even for rotary embeddings, is 7"),
    ("llama", {"attention_bias": "false"}, "attention_bias: must be true or false, is 'false'"),
    (
        "llama",
        {"attention_dropout": 1.0},
        "attention_dropout: must be a rate of at least 0 and below 1, is 1.0",
    ),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: must be a positive number, is nan"),
    (
        "mistral",
        {"sliding_window": 4.5},
        "sliding_window: must be an integer of at least 1, is 4.5",
    ),
    (
        "qwen2",
        {"layer_types": ["chunked_attention"] * 2},
        (
            "layer_types: ['chunked_attention', 'chunked_attention'] is not supported (supported:"
            " full_attention or sliding_attention, 2 times)"
        ),
    ),
    (
        "gemma2",
        {"use_bidirectional_attention": True},
        "use_bidirectional_attention: True is not supported: decoders attend to earlier",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": [7]},
        "mlp_only_layers: must be a list of layer numbers below 5, is [7]",
    ),
    (
        "qwen3_moe",
        {"mlp_only_layers": [1], "decoder_sparse_step": 4, "num_hidden_layers": 3},
        "mlp_only_layers: [1] with decoder_sparse_step 4 leaves no layer with experts",
    ),
    (
        "qwen3_moe",
        {"decoder_sparse_step": 0},
        "decoder_sparse_step: must be an integer of at least 1, is 0",
    ),
    ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar: must be a positive number"),
    (
        "qwen3_5_text",
        {"layer_types": ["sliding_attention"] * 3},
        (
            "layer_types: ['sliding_attention', 'sliding_attention', 'sliding_attention'] is not"
            " supported (supported: full_attention or linear_attention, 3 times)"
        ),
    ),
    (
        "qwen3_5_text",
        {"linear_num_value_heads": 3},
        "linear_num_key_heads: 2 does not divide linear_num_value_heads 3",
    ),
    (
        "qwen3_5_text",
        {"full_attention_interval": 0},
        "full_attention_interval: must be an integer of at least 1, is 0",
    ),
    (
        "qwen3_5_text",
        {"linear_conv_kernel_dim": "four"},
        "linear_conv_kernel_dim: must be an integer of at least 1, is 'four'",
    ),
    (
        "gemma3_text",
        {"rope_parameters": {"chunked_attention": {"rope_type": "default"}}},
        (
            "rope_parameters: separate settings for chunked_attention are not supported (supported:"
            " full_attention or sliding_attention)"
        ),
    ),
    (
        "gemma4_text",
        {"use_bidirectional_attention": "all"},
        "use_bidirectional_attention: 'all' is not supported: decoders attend to earlier positions",
    ),
    (
        "gemma4_text",
        {"enable_moe_block": True},
        "enable_moe_block: True is not supported: layers have no experts beside their feed-forward",
    ),
    (
        "gemma4_text",
        {"num_kv_shared_layers": 4},
        "num_kv_shared_layers: 4 is not supported: no full_attention layer before them has keys",
    ),
    (
        "gemma4_text",
        {"num_kv_shared_layers": 5},
        "num_kv_shared_layers: must be an integer of at most 4, is 5",
    ),
    (
        "gemma4_text",
        {"vocab_size_per_layer_input": 98},
        "vocab_size_per_layer_input: 98 is less than vocab_size 99, so that tokens have no",
    ),
    (
        "gemma4_text",
        {"per_layer_config": {"1": {"head_dim": 16}}},
        (
            "per_layer_config: {'1': {'head_dim': 16}} is not supported (supported: integers"
            " head_dim and num_key_value_heads, the same for every full_attention layer)"
        ),
    ),
    (
        "gemma4_text",
        {"global_head_dim": 15},
        "head_dim of full_attention layers: must be even for rotary embeddings, is 15",
    ),
    (
        "gemma4_unified_text",
        {"num_global_key_value_heads": 3},
        "num_key_value_heads of full_attention layers: 3 does not divide num_attention_heads 4",
    ),
    (
        "gemma4_text",
        {"rope_parameters": {"full_attention": {"rope_type": "proportional", "factor": 0}}},
        "rope_parameters: full_attention: factor: must be a positive number, is 0",
    ),
    (
        "gemma4_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 2}
            }
        },
        "rope_parameters: full_attention: partial_rotary_factor: must be from 0 to 1, is 2",
    ),
    (
        "phi3",
        {"partial_rotary_factor": 0.4},
        (
            "rope_parameters: partial_rotary_factor 0.4 is not supported (supported: at most 1, for"
            " an even number of dimensions)"
        ),
    ),
    (
        "phi3",
        {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0] * 4}},
        "rope_scaling: short_factor: must be a list of 4 numbers, is [1.0]",
    ),
    (
        "granite",
        {"residual_multiplier": None},
        "residual_multiplier: must be a positive number, is None",
    ),
    ("granite", {"logits_scaling": 0}, "logits_scaling: must be a positive number, is 0"),
    (
        "smollm3",
        {"no_rope_layers": [1, 0]},
        "no_rope_layers: must be a list of 4 numbers, 1 for a rotation and 0 for none, is [1, 0]",
    ),
    (
        "qwen2",
        {"layer_types": ["full_attention"]},
        (
            "layer_types: ['full_attention'] is not supported (supported: full_attention or"
            " sliding_attention, 2 times)"
        ),
    ),
    (
        "qwen3",
        {"layer_types": ["sliding_attention"] * 2},
        "layer_types: sliding_attention needs use_sliding_window true and sliding_window a number",
    ),
    (
        "bert",
        {"is_decoder": True},
        "is_decoder: True is not supported: only encoders are supported",
    ),
    (
        "bert",
        {"position_embedding_type": "relative_key"},
        "position_embedding_type: 'relative_key' is not supported (supported: absolute)",
    ),
    (
        "roberta",
        {"add_cross_attention": True},
        "add_cross_attention: True is not supported: only encoders are supported",
    ),
    (
        "roberta",
        {"pad_token_id": None},
        "pad_token_id: must be an integer of at least 0, is None",
    ),
    (
        "bert",
        {"pruned_heads": {"0": [1]}},
        "pruned_heads: {'0': [1]} is not supported: all layers must have all heads",
    ),
    ("bert", {"num_attention_heads": 5}, "num_attention_heads: 5 does not divide hidden_size 32"),
    ("distilbert", {"n_heads": 5}, "n_heads: 5 does not divide dim 32"),
    (
        "modernbert",
        {"layer_types": ["full_attention"]},
        (
            "layer_types: ['full_attention'] is not supported (supported: full_attention or"
            " sliding_attention, 5 times)"
        ),
    ),
    (
        "modernbert",
        {"rope_parameters": {"rope_type": "default"}},
        (
            "rope_parameters: {'rope_type': 'default'} is not supported (supported: a section each"
            " for full_attention and sliding_attention)"
        ),
    ),
    (
        "modernbert",
        {"rope_parameters": {"full_attention": {"rope_type": "snake"}}},
        "full_attention: rope_parameters: rope_type 'snake' is not supported",
    ),
    (
        "deberta-v2",
        {"pos_att_type": ["p2p"]},
        "pos_att_type: ['p2p'] is not supported (supported: c2p, p2c)",
    ),
    (
        "deberta-v2",
        {"norm_rel_ebd": "rms"},
        "norm_rel_ebd: 'rms' is not supported (supported: none, layer_norm)",
    ),
    ("deberta-v2", {"conv_kernel_size": 4}, "conv_kernel_size: must be odd, is 4"),
    (
        "deberta-v2",
        {"conv_kernel_size": 3, "conv_groups": 5},
        "conv_groups: 5 does not divide hidden_size 32",
    ),
    (
        "deberta-v2",
        {"pooler_hidden_size": 16},
        "pooler_hidden_size: 16 is not supported (supported: 32)",
    ),
    (
        "deberta-v2",
        {"attention_head_size": 16},
        "attention_head_size: 16 is not supported (supported: 8)",
    ),
    (
        "modernbert",
        {"classifier_pooling": "last"},
        "classifier_pooling: 'last' is not supported (supported: cls, mean)",
    ),
    (
        "distilbert",
        {"activation": "snake"},
        "activation: 'snake' is not supported (supported: gelu, gelu_10,",
    ),
]


@pytest.mark.parametrize(
    ("kind", "switches", "text"), REFUSED, ids=[f"{k}-{json.dumps(s)[:40]}" for k, s, _ in REFUSED]
)
def test_an_unsupported_switch_is_refused_by_name(tiny_config, kind, switches, text):
    with pytest.raises(ConfigError) as caught:
        build(tiny_config(kind, **switches))
    assert [str(p) for p in caught.value.problems if f"config.json of a {kind} model: {text}" in p]


def test_everything_is_reported_at_once(tiny_config):
    switches = {
        "hidden_act": "snake",
        "rope_scaling": {"type": "ntk"},
        "quantization_config": {"bits": 4},
    }
    with pytest.raises(ConfigError) as caught:
        build(tiny_config("llama", **switches), "fill_mask", remat="some", pooling="pooler")
    fields = ("task", "pooling", "remat", "hidden_act", "rope_scaling", "quantization_config")
    assert len(caught.value.problems) == len(fields)
    assert len(str(caught.value).splitlines()) == len(fields)
    for field in fields:
        assert any(f"{field}: " in problem for problem in caught.value.problems)


def test_one_wrong_number_is_one_problem(tiny_config):
    with pytest.raises(ConfigError) as caught:
        build(tiny_config("llama", num_attention_heads=0))
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("kind", ["mixtrall", "qwen2_moe", "lama", "berta", None, []])
def test_an_unknown_architecture_names_the_known_ones_and_invites_no_edit(kind):
    with pytest.raises(ConfigError) as caught:
        build({"model_type": kind})
    assert str(caught.value).startswith(f"config.json: model_type {kind!r} is not supported (")
    assert "did you mean" not in str(caught.value)
    assert (
        f"(supported: {', '.join((*models.FAMILIES, *TEXT_MODELS))}); use a model of one of these"
        in str(caught.value)
    )
    nearest = {"mixtrall": "mixtral", "qwen2_moe": "qwen3_moe", "lama": "llama", "berta": "bert"}
    if isinstance(kind, str):
        assert str(caught.value).endswith(f", the nearest of which is {nearest[kind]}")


@pytest.mark.parametrize("kind", ENCODERS)
def test_an_encoder_is_no_language_model(tiny_config, kind):
    with pytest.raises(
        ConfigError,
        match=f"task: 'causal_lm' is not supported by a {kind} model \\(it has sequence_classification",
    ):
        build(tiny_config(kind), "causal_lm")


@pytest.mark.parametrize("labels", [None, 0, -1, True])
def test_a_classifier_needs_labels(tiny_config, labels):
    with pytest.raises(ConfigError, match="num_labels: must be at least 1, is"):
        build(tiny_config("bert"), "sequence_classification", num_labels=labels)


@pytest.mark.parametrize(
    ("kind", "how"), [("llama", "pooler"), ("roberta", "pooler"), ("bert", "last"), ("bert", "max")]
)
def test_a_pooling_that_the_architecture_has_not(tiny_config, kind, how):
    with pytest.raises(ConfigError, match=f"pooling: '{how}' is not supported by a {kind} model"):
        build(tiny_config(kind), "sequence_classification", num_labels=2, pooling=how)


def test_pooling_goes_with_sequence_classification_only(tiny_config):
    with pytest.raises(
        ConfigError,
        match="pooling: needs task 'sequence_classification', but task is 'encoder'",
    ):
        build(tiny_config("bert"), "encoder", pooling="mean")


@pytest.mark.parametrize(
    "field", ["pretraining_tp", "initializer_range", "use_cache", "something_new"]
)
def test_what_does_not_change_the_numbers_is_not_refused(tiny_config, field):
    build(tiny_config("llama", **{field: 3}))


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", *ENCODERS])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_tree_mirrors_the_names_of_hugging_face(tiny_config, kind, scan_layers):
    from jaxpeft.core import paths

    task = "sequence_classification"
    model = build(tiny_config(kind), task, num_labels=3, scan_layers=scan_layers)
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    tree = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    names = {paths.text(path) for path, _ in paths.walk(tree)}
    number = "" if scan_layers else "1/"
    wanted = {
        "bert": f"bert/encoder/layer/{number}attention/self/query/kernel",
        "xlm-roberta": f"roberta/encoder/layer/{number}attention/self/query/kernel",
        "modernbert": f"model/layers/{'1:5:2' if scan_layers else 1}/attn_norm/scale",
        "deberta-v2": f"deberta/encoder/layer/{number}attention/self/query_proj/kernel",
        "electra": "electra/embeddings_project/kernel",
        "camembert": f"roberta/encoder/layer/{number}attention/self/query/kernel",
        "roberta": f"roberta/encoder/layer/{number}attention/output/LayerNorm/scale",
        "distilbert": f"distilbert/transformer/layer/{number}attention/q_lin/kernel",
    }.get(kind, f"model/layers/{number}self_attn/q_proj/kernel")
    assert wanted in names
    assert {name.split("/")[-1] for name in names} <= {"kernel", "bias", "embedding", "scale"}
    heads = [leaf for path, leaf in paths.walk(tree) if paths.is_head(path)]
    assert heads
    assert all(leaf.dtype == jnp.float32 for leaf in heads)
