"""GLM-4 (GLM team 2024, arXiv:2406.12793)."""

from __future__ import annotations

from jaxpeft.models.decoder_config import DecoderFamily, NormNames, flag
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
