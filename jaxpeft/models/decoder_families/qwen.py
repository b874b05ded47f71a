"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE (Qwen team 2024, arXiv:2407.10671, and 2025,
arXiv:2505.09388).
"""

from __future__ import annotations

import dataclasses

from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily
from jaxpeft.models.decoder_families.mixtures import GATED, read_mixture
from jaxpeft.models.layer_types import upper_sliding
from jaxpeft.models.router import Routing

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
    parts={**ATTENTION_BIAS, "qk_norm": True},
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
        "mixture": read_mixture(
            "mlp",
            GATED,
            "moe_intermediate_size",
            lambda reader: Routing(normalized=reader.flag("norm_topk_prob")),
        ),
    },
    refused={"mlp_only_layers": "every layer must have experts"},
)
