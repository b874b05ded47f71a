"""gpt-oss (Agarwal et al. 2025, arXiv:2508.10925)."""

from __future__ import annotations

from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily
from jaxpeft.models.decoder_families.mixtures import read_mixture
from jaxpeft.models.experts import Clamp
from jaxpeft.models.layer_types import full_every
from jaxpeft.models.router import Routing


def _clamp(reader: ConfigReader) -> Clamp:
    slope, limit = "swiglu_alpha", "swiglu_limit"
    return Clamp(
        reader.positive(slope, reader.get(slope)), reader.positive(limit, reader.get(limit))
    )


GPT_OSS = DecoderFamily(
    "gpt_oss",
    defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "sliding_window": 128,
        "attention_bias": True,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 150000.0,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    layer_types=full_every(2),
    parts={
        **ATTENTION_BIAS,
        "attention_sinks": True,
        "mixture": read_mixture(
            "mlp",
            ("gate_up_proj", "down_proj"),
            "intermediate_size",
            Routing(name="router", bias=True, normalized=True),
            bias=True,
            stacked=True,
            clamp=_clamp,
        ),
    },
    quantized=("mxfp4",),
)
