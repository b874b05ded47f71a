"""Partial fine-tuning: the last layers are fully trained, and all layers below are frozen.

Lee et al. 2019, "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", section 3
(arXiv:1911.03090).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.core import paths
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import selects_leaf
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Freeze(Method):
    """Trains every leaf of the last `layers` layers, and the modules after them; adds no leaves.

    Stacked layers are all trained or not at all.
    """

    name: ClassVar[str] = "freeze"
    paper: ClassVar[str] = "arXiv:1911.03090"

    layers: int = option(2, "number of last layers to train", at_least=1)
    final_norm: bool = option(True, "also train the norm and the pooler after the last layer")
    lm_head: bool = option(False, "also train the language-model head")
    embeddings: bool = option(False, "also train the embeddings and the norm after them")

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether a leaf belongs to the last layers.

        Raises:
            ConfigError: The model has fewer layers, or only some of its stacked layers would be
                trained.
        """
        at = paths.layers_at(path)
        if at is None:
            return self._is_around(path)
        count = _count(params, path, at)
        if self.layers > count:
            raise ConfigError(
                f"freeze.layers: is {self.layers}, but the model has only {count} layers"
            )
        first = count - self.layers

        def last(name: str) -> bool:
            number = re.search(rf"\b{path[at]}\.(\d+)\.", f"{name}.")
            return number is not None and int(number[1]) >= first

        return selects_leaf(self.name, path, paths.get(params, path), last)

    def _is_around(self, path: Path) -> bool:
        """Return whether a leaf outside the layers is trained."""
        if any("embed" in key for key in path):
            return self.embeddings
        return self.lm_head if path[0] == "lm_head" else self.final_norm


def _count(params: Leaves, path: Path, at: int) -> int:
    """Return the number of layers of the stack of a leaf."""
    named = [paths.named_layers(name) for name in paths.get(params, path[: at + 1])]
    numbers = [layers[-1] for layers in named if layers]
    return 1 + max(numbers) if numbers else paths.get(params, path).shape[0]
