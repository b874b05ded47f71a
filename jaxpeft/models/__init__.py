"""The architectures, one file a family, built from the Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.errors import ConfigError, nearest
from jaxpeft.models import decoder, encoder
from jaxpeft.models.base import Family, Options, Pretrained

_ALL: tuple[Family, ...] = (decoder.FAMILY, encoder.BERT, encoder.ROBERTA, encoder.DISTILBERT)

FAMILIES: Mapping[str, Family] = {model_type: family for family in _ALL for model_type in family.model_types}
"""Every family by the `model_type` of `config.json`."""


def build(config: Mapping[str, Any], options: Options) -> Pretrained:
    """Makes the Linen module that a `config.json` describes.

    Args:
        config: its content.
        options: task, dtype of the activations, and how layers run.

    Raises:
        ConfigError: the architecture, a switch of it or the task is not supported; everything at once.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        hint = nearest(str(kind), FAMILIES)
        raise ConfigError(f"config.json: model_type {kind!r} is not supported{hint} (supported: {', '.join(FAMILIES)})")
    return FAMILIES[kind].build(config, options)
