"""Checkpoints of several models, such as a vision tower and a decoder: their text model is used.

`transformers` names the tensors of the text model `model.language_model.layers...` or, in earlier
files, `language_model.model.layers...`. Here they have the names of the text model alone.

The text model of a Qwen-VL rotates by three positions, of time, height and width (Wang et al. 2024,
section 2.1, arXiv:2409.12191), and so does that of a Qwen3.5. In text all three are equal, so the
former is a Qwen2 or Qwen3.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxpeft.models.decoder_families import DECODER_FAMILIES

COMPOSITE = "jaxpeft_composite"
"""Field of a text model's config: the `model_type` of the checkpoint that it is a part of."""
_QWEN2_VL: Mapping[str, Any] = {"model_type": "qwen2", "rms_norm_eps": 1e-5, "rope_theta": 1e6}
TEXT_MODELS: Mapping[str, Mapping[str, Any]] = {
    "gemma3": {"model_type": "gemma3_text"},
    "gemma4": {"model_type": "gemma4_text"},
    "gemma4_unified": {"model_type": "gemma4_unified_text"},
    "mistral3": {"model_type": "mistral"},
    "qwen2_vl": _QWEN2_VL,
    "qwen2_5_vl": _QWEN2_VL,
    "qwen3_vl": {"model_type": "qwen3", "rope_theta": 5e5},
    "qwen3_5": {"model_type": "qwen3_5_text"},
}
"""Defaults of the text model's config by the `model_type` of the checkpoint."""
_SAME = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""The architecture of a text model by its own `model_type`, where they differ."""
RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
)
OTHERS = (
    r"(vision_tower|audio_tower|multi_modal_projector|visual|mtp)\..*",
    r"(embed_vision|embed_audio|vision_embedder)\..*",
)
"""Tensors of the other models, without the prefix of the backbone. `mtp` predicts several tokens,
to generate faster.
"""
_INHERITED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "eos_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model of a checkpoint; that of a text model is unchanged.

    Args:
        config: content of a `config.json`.
    """
    kind, own = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind not in TEXT_MODELS:
        return dict(config)
    if own is None and "vision_config" in config:  # Qwen2-VL's config is flat
        others = ("model_type", "architectures", "vision_config")
        own = {name: value for name, value in config.items() if name not in others}
    if not isinstance(own, Mapping):
        return dict(config)
    shared = {name: config[name] for name in _INHERITED if config.get(name) is not None}
    found = {**TEXT_MODELS[kind], **own, **shared, COMPOSITE: kind}
    found["model_type"] = _SAME.get(str(found["model_type"]), found["model_type"])
    found |= {name: _one_position(found[name]) for name in _ROPE if name in found}
    family = DECODER_FAMILIES.get(str(found["model_type"]))
    # configs on the hub leave out what is the default; rows are encoded by the vocabulary's size
    sizes = {} if family is None else {"vocab_size": family.defaults.get("vocab_size")}
    return {**{name: size for name, size in sizes.items() if size}, **found}


_ROPE = ("rope_scaling", "rope_parameters")


def _one_position(settings: Any) -> Any:
    """Return the settings of a rotation for text, where the three positions are equal."""
    if not isinstance(settings, Mapping):
        return settings
    out = {name: value for name, value in settings.items() if not name.startswith("mrope_")}
    kinds = {name: "default" for name in ("type", "rope_type") if out.get(name) == "mrope"}
    return {**out, **kinds}


def plain_names(name: str) -> str:
    """Return the name of a tensor or module of the text model, without that of the other models.

    Args:
        name: its name in a checkpoint or in an adapter file, without the prefix of the library.
    """
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def composite_name(name: str) -> str:
    """Return the name of a tensor or module of the text model in a checkpoint of several models."""
    return re.sub(r"^model\.", "model.language_model.", name)
