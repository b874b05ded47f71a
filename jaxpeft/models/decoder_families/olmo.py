"""OLMo 2 and OLMo 3 (OLMo team 2024 and 2025, arXiv:2501.00656, arXiv:2512.13961)."""

from __future__ import annotations

import dataclasses

from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily, NormNames
from jaxpeft.models.layer_types import BY_LAYERS, SLIDING, full_every
from jaxpeft.models.rope import RopeSwitches

OLMO2 = DecoderFamily(
    "olmo2",
    defaults={"rms_norm_eps": 1e-5, "pad_token_id": 1},
    parts={
        **ATTENTION_BIAS,
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
        RopeSwitches(all_layers=BY_LAYERS),
        RopeSwitches(SLIDING, scaled=False, all_layers=BY_LAYERS),
    ),
)
