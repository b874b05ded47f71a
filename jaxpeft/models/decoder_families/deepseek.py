"""DeepSeek-V3 and R1 (DeepSeek-AI 2024, arXiv:2412.19437)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.base import MOST_HEADS, ConfigReader
from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily
from jaxpeft.models.decoder_families.mixtures import GATED, read_mixture
from jaxpeft.models.latent_attention import Latent
from jaxpeft.models.rope import RopeSwitches
from jaxpeft.models.router import Routing

_MOST_EXTRA = 64


def read_latent(reader: ConfigReader) -> Latent:
    """Return the sizes of latent attention."""
    return Latent(
        reader.integer("num_attention_heads", most=MOST_HEADS),
        None if reader.get("q_lora_rank") is None else reader.integer("q_lora_rank"),
        reader.integer("kv_lora_rank"),
        reader.integer("qk_nope_head_dim", most=MOST_HEADS),
        reader.integer("qk_rope_head_dim", most=MOST_HEADS),
        reader.integer("v_head_dim", most=MOST_HEADS),
        reader.flag("attention_bias"),
    )


def read_routing(reader: ConfigReader) -> Routing:
    """Return the routing by sigmoids, of groups of experts, with a bias of the choice."""
    reader.one_of("scoring_func", {"sigmoid": None})
    reader.one_of("topk_method", {"noaux_tc": None})
    return Routing(
        normalized=reader.flag("norm_topk_prob"),
        sigmoid=True,
        corrected=True,
        groups=reader.integer("n_group"),
        chosen_groups=reader.integer("topk_group"),
        scale=reader.positive("routed_scaling_factor", reader.get("routed_scaling_factor")),
    )


def dense_first(reader: ConfigReader, layers: int) -> Sequence[Mapping[str, Any]]:
    """Return what distinguishes the first `first_k_dense_replace` layers: no experts."""
    every = "moe_layer_freq"
    if reader.get(every) not in (None, 1):
        reader.problems.append(
            f"{every}: {show(reader.get(every))} is not supported (supported: 1)"
        )
    count = reader.integer("first_k_dense_replace", least=0)
    return dense_if([i < count for i in range(layers)])


def dense_if(dense: Sequence[bool]) -> Sequence[Mapping[str, Any]]:
    """Return the parts of layers of which some have no experts."""
    return [{"mixture": None} if each else {} for each in dense]


def later_layers(count: str) -> Callable[[ConfigReader], tuple[str, ...]]:
    """Return the part `ignored` for layers that predict further tokens, which follow the others.

    Args:
        count: field with the number of these layers.
    """

    def read(reader: ConfigReader) -> tuple[str, ...]:
        first: Any = reader.get("num_hidden_layers")
        more = reader.integer(count, least=0, most=_MOST_EXTRA)
        known = isinstance(first, int)
        return tuple(rf"layers\.{first + i}\..*" for i in range(more)) if known else ()

    return read


ROUTED: Mapping[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "n_shared_experts": 1,
    "router_aux_loss_coef": 0,
    "num_nextn_predict_layers": 1,
}
"""Defaults of families with DeepSeek's experts."""
EXPERTS: Mapping[str, Any] = {
    "mixture": read_mixture(
        "mlp", GATED, "moe_intermediate_size", read_routing, shared="n_shared_experts"
    ),
    "ignored": later_layers("num_nextn_predict_layers"),
}
"""Parts of families with DeepSeek's experts."""


DEEPSEEK_V3 = DecoderFamily(
    "deepseek_v3",
    defaults={
        **ROUTED,
        "n_routed_experts": 256,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 2048,
        "n_group": 8,
        "topk_group": 4,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 3,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "rope_interleave": True,
        "max_position_embeddings": 4096,
    },
    ropes=(RopeSwitches(interleaved="rope_interleave", sharpened=True),),
    parts={**ATTENTION_BIAS, **EXPERTS},
    latent=read_latent,
    layer_parts=dense_first,
)
