"""GLM-4 (GLM team 2024, arXiv:2406.12793), GLM-4.5 and GLM-4.6 (GLM team 2025, arXiv:2508.06471),
and GLM-4.7-Flash, which has DeepSeek-V3's attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import DecoderFamily, NormNames, flag
from jaxpeft.models.decoder_families.deepseek import (
    DEEPSEEK_V3,
    EXPERTS,
    ROUTED,
    dense_first,
    dense_if,
)
from jaxpeft.models.rope import RopeSwitches

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


GLM4_MOE = DecoderFamily(
    "glm4_moe",
    defaults={
        **ROUTED,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1408,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "partial_rotary_factor": 0.5,
        "max_position_embeddings": 131072,
    },
    ropes=(RopeSwitches(partial=True),),
    parts={"qkv_bias": flag("attention_bias"), "qk_norm": flag("use_qk_norm"), **EXPERTS},
    layer_parts=dense_first,
)


def _named_dense(reader: ConfigReader, layers: int) -> Sequence[Mapping[str, Any]]:
    """Return which layers have no experts: those that `mlp_layer_types` names, or the first."""
    name, dense = "mlp_layer_types", "dense"
    found = reader.get(name)
    if found is None:
        if reader.get("first_k_dense_replace") not in (None, 1):
            reader.problems.append(f"first_k_dense_replace: has no effect; set {name} instead")
        found = [dense, *["sparse"] * (layers - 1)]
    kinds = (dense, "sparse")
    if not isinstance(found, list) or len(found) != layers or any(n not in kinds for n in found):
        reader.problems.append(
            f"{name}: {show(found)} is not supported (supported: dense or sparse, {layers} times)"
        )
        return ()
    return dense_if([each == dense for each in found])


GLM4_MOE_LITE = dataclasses.replace(
    DEEPSEEK_V3,
    model_type="glm4_moe_lite",
    defaults={
        **DEEPSEEK_V3.defaults,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 1536,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.8,
        "first_k_dense_replace": None,
        "q_lora_rank": 768,
        "qk_nope_head_dim": 192,
        "v_head_dim": 256,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 202752,
    },
    layer_parts=_named_dense,
)
