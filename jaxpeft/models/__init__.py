"""The architectures, one file a family, built from the Hugging Face config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.errors import ConfigError, show
from jaxpeft.models import decoder, encoder
from jaxpeft.models.base import Family, ModelOptions, Pretrained

_ALL: tuple[Family, ...] = (decoder.FAMILY, encoder.BERT, encoder.ROBERTA, encoder.DISTILBERT)

FAMILIES: Mapping[str, Family] = {
    model_type: family for family in _ALL for model_type in family.model_types
}
"""Every family by the `model_type` of `config.json`."""


def build(
    config: Mapping[str, Any], options: ModelOptions, where: str = "config.json"
) -> Pretrained:
    """Make the Linen module that a `config.json` describes.

    Args:
        config: its content.
        options: task, dtype of the activations, and how layers run.
        where: what to call the file in messages.

    Raises:
        ConfigError: the architecture, a switch of it or the task is not supported; everything at
            once.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        # no hint of a near name: under another model_type the weights would be computed as what
        # they are not
        known = ", ".join(FAMILIES)
        raise ConfigError(
            f"{where}: model_type {show(kind)} is not supported (supported: {known}); give a model"
            " of one of these"
        )
    return FAMILIES[kind].build(config, options, where)
