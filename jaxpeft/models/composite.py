"""Checkpoints of several models, such as a vision tower and a decoder: their text model is used.

`transformers` names the tensors of the text model `model.language_model.layers...` or, in earlier
files, `language_model.model.layers...`. Here they have the names of the text model alone.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from jaxpeft.models.decoder_families import DECODER_FAMILIES

COMPOSITE = "jaxpeft_composite"
"""Field of a text model's config: the `model_type` of the checkpoint that it is a part of."""
TEXT_MODELS: Mapping[str, str] = {"gemma3": "gemma3_text", "mistral3": "mistral"}
"""The text model's default `model_type` by that of the checkpoint."""
RENAMED = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^(model\.language_model|language_model\.model)\.", "model."),
)
OTHERS = (r"(vision_tower|multi_modal_projector)\..*",)
"""Tensors of the other models, without the prefix of the backbone."""
_INHERITED = ("tie_word_embeddings", "dtype", "torch_dtype", "quantization_config", "eos_token_id")


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of the text model of a checkpoint; that of a text model is unchanged.

    Args:
        config: content of a `config.json`.
    """
    kind, own = config.get("model_type"), config.get("text_config")
    if not isinstance(kind, str) or kind not in TEXT_MODELS or not isinstance(own, Mapping):
        return dict(config)
    shared = {name: config[name] for name in _INHERITED if config.get(name) is not None}
    found = {"model_type": TEXT_MODELS[kind], **own, **shared, COMPOSITE: kind}
    family = DECODER_FAMILIES.get(str(found["model_type"]))
    # configs on the hub leave out what is the default; rows are encoded by the vocabulary's size
    sizes = {} if family is None else {"vocab_size": family.defaults.get("vocab_size")}
    return {**{name: size for name, size in sizes.items() if size}, **found}


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
