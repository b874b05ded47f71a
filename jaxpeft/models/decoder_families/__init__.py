"""The decoder families: a table for each, of what distinguishes it from Llama."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpeft.models.decoder_config import DecoderFamily
from jaxpeft.models.decoder_families.deepseek import DEEPSEEK_V3
from jaxpeft.models.decoder_families.gemma import GEMMA, GEMMA2, GEMMA3
from jaxpeft.models.decoder_families.gemma4 import GEMMA4, GEMMA4_UNIFIED
from jaxpeft.models.decoder_families.glm import GLM4, GLM4_MOE, GLM4_MOE_LITE
from jaxpeft.models.decoder_families.gpt_oss import GPT_OSS
from jaxpeft.models.decoder_families.granite import GRANITE
from jaxpeft.models.decoder_families.llama import LLAMA
from jaxpeft.models.decoder_families.mistral import MINISTRAL3, MISTRAL, MIXTRAL
from jaxpeft.models.decoder_families.olmo import OLMO2, OLMO3
from jaxpeft.models.decoder_families.phi import PHI3
from jaxpeft.models.decoder_families.qwen import QWEN2, QWEN3, QWEN3_5, QWEN3_MOE
from jaxpeft.models.decoder_families.smollm import SMOLLM3

DECODER_FAMILIES: Mapping[str, DecoderFamily] = {
    family.model_type: family
    for family in (
        LLAMA,
        MISTRAL,
        MINISTRAL3,
        MIXTRAL,
        QWEN2,
        QWEN3,
        QWEN3_MOE,
        QWEN3_5,
        GEMMA,
        GEMMA2,
        GEMMA3,
        GEMMA4,
        GEMMA4_UNIFIED,
        PHI3,
        GLM4,
        GLM4_MOE,
        GLM4_MOE_LITE,
        DEEPSEEK_V3,
        GPT_OSS,
        GRANITE,
        OLMO2,
        OLMO3,
        SMOLLM3,
    )
}
"""Every decoder family by its `model_type`."""
