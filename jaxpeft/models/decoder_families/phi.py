"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219, arXiv:2412.08905)."""

from __future__ import annotations

from jaxpeft.models.decoder_config import DecoderFamily
from jaxpeft.models.layer_types import SLIDING
from jaxpeft.models.rope import RopeSwitches

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
