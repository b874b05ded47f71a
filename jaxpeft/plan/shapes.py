"""Built-in `config.json` contents of known models, for plans without files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "vocab_size": 128256,
    "num_key_value_heads": 8,
    "dtype": "bfloat16",
}


def _llama(
    hidden: int, wide: int, layers: int, heads: int, *, tied: bool = False
) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "tie_word_embeddings": tied,
    }


SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama3_1b": _llama(2048, 8192, 16, 32, tied=True),
    "llama3_8b": _llama(4096, 14336, 32, 32),
    "llama3_70b": _llama(8192, 28672, 80, 64),
    "llama3_405b": _llama(16384, 53248, 126, 128),
}
"""Llama 3 shapes by name in `--model-config`: Grattafiori et al. 2024, table 3 (arXiv:2407.21783),
and Llama-3.2-1B.
"""
