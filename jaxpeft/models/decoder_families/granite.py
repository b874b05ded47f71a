"""Granite 3 (Granite team 2024)."""

from __future__ import annotations

from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily, flag, positive

GRANITE = DecoderFamily(
    "granite",
    defaults={
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    parts={
        **ATTENTION_BIAS,
        "mlp_bias": flag("mlp_bias"),
        "input_scale": positive("embedding_multiplier"),
        "residual_scale": positive("residual_multiplier"),
        "attention_scale": positive("attention_multiplier"),
        "logits_scale": lambda reader: 1 / positive("logits_scaling")(reader),
    },
)
