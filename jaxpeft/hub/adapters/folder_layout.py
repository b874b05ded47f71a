"""How adapter folders are laid out: which files there are, and what stands in them.

Inside jaxpeft an adapter is a config and named tensors, as Hugging Face PEFT has them, with the
names of the options and tensors that its method gives. A layout turns that to the files of a
library, and back. A method names its layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained

CONFIG, EXTRA = "adapter_config.json", "jaxpeft.json"


@dataclass(frozen=True)
class Content:
    """What an adapter folder is to hold.

    Attributes:
        config: as PEFT has it.
        tensors: float32, by name.
        sites: the Hugging Face names of the adapted sites.
        model: what it is for.
        labels: names of a classifier's labels, in order.
    """

    config: Mapping[str, Any]
    tensors: Mapping[str, Any]
    sites: Sequence[str]
    model: Pretrained
    labels: tuple[str, ...]


class FolderLayout:
    """The layout of Hugging Face PEFT, and what others change of it.

    Class attributes:
        library: whose it is.
        name: what its library is called in a model card.
        weights: the file that an adapter folder holds.
        pickle: the pickle that the library may write in its place.
        fix: how the library writes no pickle.
        usage: what a model card says of how the library loads it.
    """

    library: str = "Hugging Face PEFT"
    name: str = "peft"
    weights: str = "adapter_model.safetensors"
    pickle: str = "adapter_model.bin"
    fix: str = "save it as safetensors"
    usage: str = ""

    def files(self, content: Content) -> dict[str, Mapping[str, Any]]:
        """Return the content of each file by its name: of a `.json` values, of a `.safetensors`
        tensors.

        Args:
            content: what is to be saved.

        Raises:
            AdapterError: the files have no place for a part of it.
        """
        return {CONFIG: content.config, self.weights: content.tensors}

    def read(
        self, folder: Path, model: Pretrained, params: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a folder.

        Args:
            folder: holds `weights`.
            model: what the adapter is loaded for.
            params: its parameters.

        Returns:
            `(config, tensors)`, as PEFT has them; a tensor has `shape`, `dtype` and `nbytes`, and
            is read by `read()`.

        Raises:
            AdapterError: listing what cannot be read.
            WeightsError: a file is missing or broken.
        """
        del model, params
        return read_json(folder / CONFIG), dict(read_header(folder / self.weights))
