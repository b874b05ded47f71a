"""Qwen2, Qwen2.5, Qwen3 and Qwen3-MoE (Qwen team 2024, arXiv:2407.10671, and 2025,
arXiv:2505.09388), and Qwen3.5.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.base import MOST_HEADS, ConfigReader
from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily
from jaxpeft.models.decoder_families.mixtures import GATED, read_mixture
from jaxpeft.models.delta_net import DeltaNet
from jaxpeft.models.layer_types import FULL, LINEAR, SLIDING, named_types, upper_sliding
from jaxpeft.models.rope import RopeSwitches
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
            GATED,
            "moe_intermediate_size",
            lambda reader: Routing(normalized=reader.flag("norm_topk_prob")),
        ),
    },
    layer_parts=_sparse_layers,
)


def _linear_types(reader: ConfigReader, layers: int) -> Sequence[str]:
    """Every n-th layer has attention, the others delta nets, unless `layer_types` names them."""
    every = reader.integer("full_attention_interval")
    usual = [FULL if (i + 1) % every == 0 else LINEAR for i in range(layers)]
    return named_types(reader, layers, usual, kinds=(FULL, LINEAR))


def _delta_net(reader: ConfigReader) -> DeltaNet:
    """Read the sizes of the delta nets."""
    keys, values = (
        reader.integer(f"linear_num_{kind}_heads", most=MOST_HEADS) for kind in ("key", "value")
    )
    if values % keys:
        reader.problems.append(
            f"linear_num_key_heads: {keys} does not divide linear_num_value_heads {values}"
        )
    return DeltaNet(
        key_heads=keys,
        value_heads=values,
        key_dim=reader.integer("linear_key_head_dim", most=MOST_HEADS),
        value_dim=reader.integer("linear_value_head_dim", most=MOST_HEADS),
        window=reader.integer("linear_conv_kernel_dim", most=MOST_HEADS),
    )


def _linear_layers(reader: ConfigReader, layers: int) -> Sequence[dict[str, Any]]:
    net = _delta_net(reader)
    return [
        {"delta_net": net if kind == LINEAR else None} for kind in _linear_types(reader, layers)
    ]


QWEN3_5 = DecoderFamily(
    "qwen3_5_text",
    defaults={
        "vocab_size": 248320,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 32768,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    layer_types=_linear_types,
    ropes=(RopeSwitches(partial=True),),
    parts={**ATTENTION_BIAS, "qk_norm": True, "norm_offset": 1.0, "output_gate": True},
    layer_parts=_linear_layers,
)
