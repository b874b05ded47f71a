"""The decoder families: a table for each, of what distinguishes it from Llama.

| family | publication |
|---|---|
| Llama 2, 3 | Touvron et al. 2023 (arXiv:2307.09288), Grattafiori et al. 2024 (arXiv:2407.21783) |
| Mistral, Ministral 3 | Jiang et al. 2023 (arXiv:2310.06825) |
| Mixtral | Jiang et al. 2024 (arXiv:2401.04088) |
| Qwen2, Qwen2.5, Qwen3, Qwen3-MoE | Qwen team 2024, 2025 (arXiv:2407.10671, arXiv:2505.09388) |
| Gemma, Gemma 2, Gemma 3 | Gemma team 2024, 2025 (arXiv:2403.08295, 2408.00118, 2503.19786) |
| Phi-3, Phi-4 | Abdin et al. 2024 (arXiv:2404.14219, arXiv:2412.08905) |
| GLM-4 | GLM team 2024 (arXiv:2406.12793) |
| Granite 3 | Granite team 2024 |
| OLMo 2, OLMo 3 | OLMo team 2024 and 2025 (arXiv:2501.00656, arXiv:2512.13961) |
| SmolLM3 | Bakouch et al. 2025 |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import (
    FULL,
    SLIDING,
    DecoderFamily,
    NormNames,
    Part,
    all_sliding,
    flag,
    full_every,
    maybe_number,
    named_types,
    positive,
    upper_sliding,
)
from jaxpeft.models.experts import Mixture
from jaxpeft.models.rope import NO_ROPE, RopeSwitches

_BY_LAYERS = (FULL, SLIDING)
_ATTENTION_BIAS: Mapping[str, Part] = {
    "qkv_bias": flag("attention_bias"),
    "output_bias": flag("attention_bias"),
}

LLAMA = DecoderFamily("llama", parts={**_ATTENTION_BIAS, "mlp_bias": flag("mlp_bias")})
MISTRAL = DecoderFamily(
    "mistral",
    defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    layer_types=all_sliding,
)


def _growth(reader: ConfigReader) -> tuple[float, float] | None:
    """Return the numbers of `DecoderConfig.query_growth`."""
    settings: Any = reader.get("rope_parameters")
    settings = settings if isinstance(settings, Mapping) else {}
    name, start = "llama_4_scaling_beta", "original_max_position_embeddings"
    if settings.get(name) is None:
        return None
    beta, most = (
        reader.positive(f"rope_parameters: {key}", settings.get(key)) for key in (name, start)
    )
    return beta, most


MINISTRAL3 = DecoderFamily(
    "ministral3",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    layer_types=lambda reader, layers: [SLIDING] * layers,
    parts={"query_growth": _growth},
)
QWEN2 = DecoderFamily(
    "qwen2",
    defaults={"sliding_window": 4096},
    layer_types=upper_sliding,
    parts={"qkv_bias": True},
)
QWEN3 = DecoderFamily(
    "qwen3",
    defaults={"sliding_window": 4096, "head_dim": 128},
    layer_types=upper_sliding,
    parts={**_ATTENTION_BIAS, "qk_norm": True},
)


def _mixture(
    module: str, names: tuple[str, str, str], width: str, normalized: Part
) -> Callable[[ConfigReader], Mixture]:
    """Return the part `mixture` of a family.

    Args:
        module: see `Mixture`.
        names: see `Mixture`.
        width: field of `config.json` with the width of an expert.
        normalized: see `Mixture`.
    """

    def read(reader: ConfigReader) -> Mixture:
        local = "num_local_experts"  # what transformers 5 writes for every family
        experts = "num_experts" if reader.get(local) is None else local
        count = reader.integer(experts)
        chosen = reader.integer("num_experts_per_tok")
        if chosen > count:
            reader.problems.append(
                f"num_experts_per_tok: is {chosen}, but there are only {count} experts ({experts})"
            )
        return Mixture(
            module,
            names,
            count,
            min(chosen, count),
            reader.integer(width),
            bool(normalized(reader) if callable(normalized) else normalized),
            reader.number("router_aux_loss_coef") if reader.flag("output_router_logits") else 0.0,
        )

    return read


MIXTRAL = dataclasses.replace(
    MISTRAL,
    model_type="mixtral",
    defaults={
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
    },
    parts={"mixture": _mixture("block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size", True)},
    refused={"router_jitter_noise": "the router has no noise"},
)
QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    defaults={
        "sliding_window": 4096,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "router_aux_loss_coef": 0.001,
    },
    parts={
        **QWEN3.parts,
        "mixture": _mixture(
            "mlp",
            ("gate_proj", "up_proj", "down_proj"),
            "moe_intermediate_size",
            flag("norm_topk_prob"),
        ),
    },
    refused={"mlp_only_layers": "every layer must have experts"},
)


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
        **_ATTENTION_BIAS,
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
        **_ATTENTION_BIAS,
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
        RopeSwitches(all_layers=_BY_LAYERS),
        RopeSwitches(SLIDING, theta="rope_local_base_freq", scaled=False, all_layers=_BY_LAYERS),
    ),
    parts={**GEMMA2.parts, "qk_norm": True, "attention_cap": None},
)
PHI3 = DecoderFamily(
    "phi3",
    defaults={
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32000,
    },
    layer_types=lambda reader, layers: [SLIDING] * layers,
    ropes=(RopeSwitches(partial=True, renamed=(("su", "longrope"), ("yarn", "longrope"))),),
    parts={
        "fused_qkv": True,
        "fused_gate_up": True,
        "residual_dropout": lambda reader: reader.rate("resid_pdrop"),
    },
)
GLM4 = DecoderFamily(
    "glm4",
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "rms_norm_eps": 1.5625e-07,
        "partial_rotary_factor": 0.5,
        "attention_bias": True,
        "pad_token_id": 151329,
    },
    ropes=(RopeSwitches(partial=True, interleaved=True),),
    parts={
        "qkv_bias": flag("attention_bias"),
        "fused_gate_up": True,
        "norms": NormNames(
            "input_layernorm",
            "post_self_attn_layernorm",
            "post_attention_layernorm",
            "post_mlp_layernorm",
        ),
    },
)
GRANITE = DecoderFamily(
    "granite",
    defaults={
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    parts={
        **_ATTENTION_BIAS,
        "mlp_bias": flag("mlp_bias"),
        "input_scale": positive("embedding_multiplier"),
        "residual_scale": positive("residual_multiplier"),
        "attention_scale": positive("attention_multiplier"),
        "logits_scale": lambda reader: 1 / positive("logits_scaling")(reader),
    },
)
OLMO2 = DecoderFamily(
    "olmo2",
    defaults={"rms_norm_eps": 1e-5, "pad_token_id": 1},
    parts={
        **_ATTENTION_BIAS,
        "qk_norm": True,
        "wide_qk_norm": True,
        "norms": NormNames("", "post_attention_layernorm", "", "post_feedforward_layernorm"),
    },
)
OLMO3 = dataclasses.replace(
    OLMO2,
    model_type="olmo3",
    defaults={**OLMO2.defaults, "rope_theta": 5e5, "sliding_window": 4096},
    layer_types=full_every(4),
    ropes=(
        RopeSwitches(all_layers=_BY_LAYERS),
        RopeSwitches(SLIDING, scaled=False, all_layers=_BY_LAYERS),
    ),
)


def _rotating(reader: ConfigReader, layers: int) -> list[bool] | None:
    """Return which layers rotate queries and keys; None if the config does not say it properly."""
    named = reader.get("no_rope_layers")
    if named is None:
        every = reader.get("no_rope_layer_interval")
        valid = isinstance(every, int) and every > 0
        return [(i + 1) % every != 0 for i in range(layers)] if valid else None
    if not isinstance(named, list) or len(named) != layers or any(n not in (0, 1) for n in named):
        return None
    return [bool(on) for on in named]


def _smollm3_types(reader: ConfigReader, layers: int) -> Sequence[str]:
    windows = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    rotating = _rotating(reader, layers) or [True] * layers
    usual = [SLIDING if windows and not on else FULL for on in rotating]
    found = named_types(reader, layers, usual)
    return found if windows else [FULL] * layers


def _smollm3_ropes(reader: ConfigReader) -> tuple[int, ...] | None:
    layers = reader.get("num_hidden_layers")
    rotating = _rotating(reader, layers) if isinstance(layers, int) else []
    if rotating is None:
        reader.problems.append(
            f"no_rope_layers: must be a list of {layers} numbers, 1 for a rotation and 0 for none,"
            f" is {show(reader.get('no_rope_layers'))}"
        )
        return None
    return tuple(int(not on) for on in rotating)


SMOLLM3 = DecoderFamily(
    "smollm3",
    defaults={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "pad_token_id": 128004,
    },
    layer_types=_smollm3_types,
    parts={
        **LLAMA.parts,
        "other_ropes": (NO_ROPE,),
        "layer_ropes": _smollm3_ropes,
    },
)

DECODER_FAMILIES: Mapping[str, DecoderFamily] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL3,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        GEMMA,
        GEMMA2,
        GEMMA3,
        PHI3,
        GLM4,
        GRANITE,
        OLMO2,
        OLMO3,
        SMOLLM3,
    )
}
"""Every decoder family by its `model_type`."""
