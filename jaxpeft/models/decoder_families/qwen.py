"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE (Qwen team 2024, arXiv:2407.10671, and 2025,
arXiv:2505.09388).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import (
    ATTENTION_BIAS,
    FULL,
    SLIDING,
    DecoderFamily,
    flag,
    upper_sliding,
)
from jaxpeft.models.decoder_families.mixtures import read_mixture

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


def _all_or_none(reader: ConfigReader, layers: int) -> Sequence[str]:
    """Every layer has a window if `use_sliding_window` is on, whatever `layer_types` says."""
    return [SLIDING if reader.flag("use_sliding_window") else FULL] * layers


def _sparse_layers(reader: ConfigReader, layers: int) -> Sequence[Mapping[str, Any]]:
    """Return the parts of each layer: every `decoder_sparse_step`-th has experts, except for those
    in `mlp_only_layers`; the others are dense.
    """
    every, named = reader.integer("decoder_sparse_step"), reader.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(i not in range(layers) for i in named):
        reader.problems.append(
            f"mlp_only_layers: must be a list of layer numbers below {layers}, is {show(named)}"
        )
        return ()
    dense = [i in named or (i + 1) % every > 0 for i in range(layers)]
    if all(dense):
        reader.problems.append(
            f"mlp_only_layers: {show(named)} with decoder_sparse_step {every} leaves no layer with"
            " experts; use model_type qwen3 for a dense model"
        )
    return [{"mixture": None} if each else {} for each in dense] if any(dense) else ()


QWEN3_MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    layer_types=_all_or_none,
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
            ("gate_proj", "up_proj", "down_proj"),
            "moe_intermediate_size",
            flag("norm_topk_prob"),
        ),
    },
    layer_parts=_sparse_layers,
)
