"""Gemma, Gemma 2 and Gemma 3 (Gemma team 2024 and 2025, arXiv:2403.08295, arXiv:2408.00118,
arXiv:2503.19786).
"""

from __future__ import annotations

import dataclasses
import math

from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import (
    ATTENTION_BIAS,
    DecoderFamily,
    NormNames,
    maybe_number,
    positive,
)
from jaxpeft.models.layer_types import BY_LAYERS, SLIDING, full_every
from jaxpeft.models.rope import RopeSwitches


def _root_of_width(reader: ConfigReader) -> float:
    width = reader.get("hidden_size")
    return math.sqrt(width) if isinstance(width, int) and width > 0 else 1.0


def _gemma_activation(reader: ConfigReader) -> str:
    """Gemma's first configs say `gelu`, but its weights are for the approximation."""
    found = reader.one_of("hidden_act", ACTIVATIONS)
    return "gelu_pytorch_tanh" if found == "gelu" else found


def _query_scale(reader: ConfigReader) -> float:
    return positive("query_pre_attn_scalar")(reader) ** -0.5


_CAUSAL_ONLY = {"use_bidirectional_attention": "decoders attend to earlier positions only"}


GEMMA = DecoderFamily(
    "gemma",
    defaults={
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": 256,
        "num_key_value_heads": 16,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
    },
    parts={
        **ATTENTION_BIAS,
        "hidden_act": _gemma_activation,
        "norm_offset": 1.0,
        "embedding_scale": _root_of_width,
    },
    refused=_CAUSAL_ONLY,
)


GEMMA2 = DecoderFamily(
    "gemma2",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    layer_types=full_every(2),
    parts={
        **ATTENTION_BIAS,
        "hidden_act": lambda reader: reader.one_of("hidden_activation", ACTIVATIONS),
        "norms": NormNames(
            "input_layernorm",
            "post_attention_layernorm",
            "pre_feedforward_layernorm",
            "post_feedforward_layernorm",
        ),
        "norm_offset": 1.0,
        "embedding_scale": _root_of_width,
        "attention_scale": _query_scale,
        "attention_cap": maybe_number("attn_logit_softcapping"),
        "logits_cap": maybe_number("final_logit_softcapping"),
    },
    refused=_CAUSAL_ONLY,
)


GEMMA3 = dataclasses.replace(
    GEMMA2,
    model_type="gemma3_text",
    defaults={
        **GEMMA2.defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    layer_types=full_every(6, "sliding_window_pattern"),
    ropes=(
        RopeSwitches(all_layers=BY_LAYERS),
        RopeSwitches(SLIDING, theta="rope_local_base_freq", scaled=False, all_layers=BY_LAYERS),
    ),
    parts={**GEMMA2.parts, "qk_norm": True, "attention_cap": None},
)
