"""The `config.json` of a model folder, as that of its text model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.models.composite import COMPOSITE, text_config

CONFIG = "config.json"


def read_model_config(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's `config.json`, of a composite checkpoint its text model's.

    Raises:
        WeightsError: The file cannot be read.
    """
    return text_config(read_json(folder / CONFIG))


def is_composite(model: Pretrained) -> bool:
    """Return whether a model was loaded from a checkpoint that also has other models."""
    return model.source is not None and COMPOSITE in read_model_config(model.source.folder)
