"""Adapter files of a language model whose head is its embedding: what PEFT writes of the one module
under two names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.errors import AdapterError
from jaxpeft.models.base import Pretrained

_FIX = (
    "give a base whose head is a module of its own (tie_word_embeddings false), or merge the"
    " adapter in PEFT"
)


@dataclass(frozen=True)
class Tie:
    """The one module under its two names.

    Attributes:
        embedding: what the names of the embedding's tensors begin with in a file.
        head: the same of the language-model head.
    """

    embedding: str
    head: str

    def one(
        self,
        header: Mapping[str, Any],
        file: Path,
        saved: tuple[str, ...],
        base: np.ndarray[Any, Any] | None,
    ) -> dict[str, Any]:
        """Return the tensors of a file under the embedding's name alone.

        Args:
            header: the tensors.
            file: the file, for messages.
            saved: the modules that PEFT has made copies of to train them whole (`modules_to_save`),
                which unties them.
            base: the embedding, `[vocab, d]`.

        Raises:
            AdapterError: the head was trained apart from the embedding.
        """
        kept = {name: tensor for name, tensor in header.items() if not name.startswith(self.head)}
        for name in header.keys() - kept.keys():
            what = name.removeprefix(self.head)
            twin = header.get(self.embedding + what)
            own = header[name].read()
            alike = (
                base if twin is None and what in _WHOLE else None if twin is None else twin.read()
            )
            if alike is not None and np.array_equal(own, alike):
                continue
            if (
                twin is None and what == "weight" and not saved
            ):  # PEFT sets the one module by either name
                kept[self.embedding + what] = header[name]
                continue
            raise AdapterError(
                f"{file}: {name}: the adapter trains lm_head by itself, and this model ties its"
                f" head to the embedding; {_FIX}"
            )
        weight = f"{self.embedding}weight"
        if weight in header and f"{self.head}weight" not in header and saved:
            raise AdapterError(
                f"{file}: {weight} was trained and {self.head}weight is as in the base: PEFT untied"
                " them, and this model ties them; train it with ensure_weight_tying=True"
            )
        return kept


_WHOLE = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")


def tie_of(prefix: str, model: Pretrained, params: Mapping[str, Any]) -> tuple[Tie | None, Any]:
    """Return the names of the embedding that is the language-model head as well, and its leaf; None
    where it is not.

    PEFT unties the two where only one is saved, and ties them by `ensure_weight_tying` and a copy
    as `lm_head`.

    Args:
        prefix: what the names of the base's modules begin with in the file.
        model: what the adapter is for.
        params: its parameters.
    """
    if model.options.task != "causal_lm" or "lm_head" in params:
        return None, None
    ((path, leaf),) = ((path, leaf) for path, leaf in paths.walk(params) if path[-1] == "embedding")
    return Tie(f"{prefix}{paths.hf_names(path[:-1], None)[0]}.", f"{prefix}lm_head."), leaf
