"""The architectures, one file per family, built from the Hugging Face config."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from jaxpeft.errors import ConfigError, show
from jaxpeft.models import deberta, decoder, encoder, modernbert
from jaxpeft.models.base import Family, ModelOptions, Pretrained
from jaxpeft.models.composite import TEXT_MODELS, text_config

_ALL: tuple[Family, ...] = (
    *decoder.FAMILIES,
    *encoder.FAMILIES,
    modernbert.FAMILY,
    deberta.FAMILY,
)

FAMILIES: Mapping[str, Family] = {
    model_type: family for family in _ALL for model_type in family.model_types
}
"""Every family by the `model_type` of `config.json`."""


def build(
    config: Mapping[str, Any], options: ModelOptions, where: str = "config.json"
) -> Pretrained:
    """Return the Linen module that a `config.json` describes.

    Args:
        config: its content.
        options: task, dtype of the activations, and how layers run.
        where: path of the file, for messages.

    Raises:
        ConfigError: The architecture, one of its switches or the task is not supported; it lists
            all problems.
    """
    config = text_config(config)
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        # the nearest is no suggestion to edit the file: its weights would be misinterpreted
        known = (*FAMILIES, *TEXT_MODELS)
        near = difflib.get_close_matches(kind, known, 1, 0.5) if isinstance(kind, str) else []
        nearest = f", the nearest of which is {near[0]}" if near else ""
        raise ConfigError(
            f"{where}: model_type {show(kind)} is not supported (supported:"
            f" {', '.join(known)}); use a model of one of these{nearest}"
        )
    return FAMILIES[kind].build(config, options, where)
