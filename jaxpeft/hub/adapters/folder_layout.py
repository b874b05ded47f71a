"""The layout of adapter folders: their files and the content of each.

In memory, an adapter is a config and named tensors in the style of Hugging Face PEFT, with the
option and tensor names of its method. A layout converts that to the files of a library and back.
Each method names its layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.hub.text_config import is_composite
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.models.composite import composite_name, plain_names

CONFIG, EXTRA = "adapter_config.json", "jaxpeft.json"


@dataclass(frozen=True)
class Content:
    """The content of an adapter folder.

    Attributes:
        config: the config in PEFT's format.
        tensors: float32 tensors by name.
        sites: Hugging Face names of the adapted sites.
        model: the model that it adapts.
        labels: label names of a classifier, in order.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    sites: Sequence[str]
    model: Pretrained
    labels: tuple[str, ...]


class FolderLayout:
    """The layout of Hugging Face PEFT, and the base class of other layouts.

    Class attributes:
        library: full name of the library.
        name: name of the library in a model card.
        weights: name of the weights file.
        pickle: name of the pickle that the library may write instead.
        fix: how to save safetensors instead of a pickle.
        usage: how to load the folder in the library, for the model card.
    """

    library: str = "Hugging Face PEFT"
    name: str = "peft"
    weights: str = "adapter_model.safetensors"
    pickle: str = "adapter_model.bin"
    fix: str = "save it as safetensors"
    usage: str = ""

    def files(self, content: Content) -> dict[str, Mapping[str, Any]]:
        """Return the content of each file by its name: values of a `.json`, tensors of a
        `.safetensors`.

        Args:
            content: the content to save.

        Raises:
            AdapterError: Part of it cannot be stored in these files.
        """
        config, tensors = content.config, content.tensors
        if is_composite(content.model):
            # peft adapts the whole checkpoint, whose other models have modules of the same names
            if config.get("target_modules"):
                own = sorted(map(composite_name, content.sites))
                config = {**config, "target_modules": own, **_NO_SELECTION}
            tensors = {_in_file(name, composite_name): t for name, t in tensors.items()}
        return {CONFIG: config, self.weights: tensors}

    def read(
        self, folder: Path, model: Pretrained, params: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a folder.

        Args:
            folder: folder that contains `weights`.
            model: the model to adapt.
            params: its parameters.

        Returns:
            `(config, tensors)` in PEFT's format; a tensor has `shape`, `dtype` and `nbytes`, and
            `read()` reads it.

        Raises:
            AdapterError: Parts cannot be read; it lists all of them.
            WeightsError: A file is missing or broken.
        """
        del model, params
        config, header = read_json(folder / CONFIG), read_header(folder / self.weights)
        targets = config.get("target_modules")
        if isinstance(targets, list):
            config["target_modules"] = [
                plain_names(name) if isinstance(name, str) else name for name in targets
            ]
        return config, {_in_file(name, plain_names): t for name, t in header.items()}


_PREFIX = "base_model.model."
_NO_SELECTION = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}


def _in_file(name: str, rename: Callable[[str], str]) -> str:
    """Return the name of a tensor in a file, with its module renamed."""
    if not name.startswith(_PREFIX):
        return name
    return _PREFIX + rename(name.removeprefix(_PREFIX))
