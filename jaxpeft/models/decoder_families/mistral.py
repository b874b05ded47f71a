"""Mistral and Ministral 3 (Jiang et al. 2023, arXiv:2310.06825), and Mixtral (Jiang et al. 2024,
arXiv:2401.04088).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import DecoderFamily
from jaxpeft.models.decoder_families.mixtures import read_mixture
from jaxpeft.models.layer_types import SLIDING, all_sliding
from jaxpeft.models.router import Routing

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
    parts={
        "mixture": read_mixture(
            "block_sparse_moe", ("w1", "w3", "w2"), "intermediate_size", Routing(normalized=True)
        )
    },
    refused={"router_jitter_noise": "the router has no noise"},
)
