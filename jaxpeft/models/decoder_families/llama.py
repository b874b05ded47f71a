"""Llama 2 and 3 (Touvron et al. 2023, arXiv:2307.09288, and Grattafiori et al. 2024,
arXiv:2407.21783).
"""

from __future__ import annotations

from jaxpeft.models.decoder_config import ATTENTION_BIAS, DecoderFamily, flag

LLAMA = DecoderFamily("llama", parts={**ATTENTION_BIAS, "mlp_bias": flag("mlp_bias")})
