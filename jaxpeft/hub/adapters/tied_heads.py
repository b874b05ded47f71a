"""Adapter files of a language model with a tied head, which PEFT may write under two names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.errors import AdapterError
from jaxpeft.methods.virtual_tokens import word_embedding
from jaxpeft.models.base import Pretrained

_FIX = "use a base with an untied head (tie_word_embeddings false), or merge the adapter in PEFT"


@dataclass(frozen=True)
class Tie:
    """The two names of a tied embedding.

    Attributes:
        embedding: prefix of the embedding's tensors in a file.
        head: prefix of the language-model head's tensors in a file.
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
        """Return the tensors of a file, with those of the head under the embedding's name.

        Args:
            header: the tensors.
            file: the file, for messages.
            saved: modules that PEFT copies and trains in full (`modules_to_save`), which unties
                them.
            base: the embedding, `[vocab, d]`.

        Raises:
            AdapterError: The head was trained separately from the embedding.
        """
        kept = {name: tensor for name, tensor in header.items() if not name.startswith(self.head)}
        for name in header.keys() - kept.keys():
            suffix = name.removeprefix(self.head)
            twin = header.get(self.embedding + suffix)
            own = header[name].read()
            expected = (
                base
                if twin is None and suffix in _BASE_WEIGHTS
                else None
                if twin is None
                else twin.read()
            )
            if expected is not None and np.array_equal(own, expected):
                continue
            # PEFT loads the tied module from either name
            if twin is None and suffix == "weight" and not saved:
                kept[self.embedding + suffix] = header[name]
                continue
            raise AdapterError(
                f"{file}: {name}: the adapter trains lm_head separately, but this model ties its"
                f" head to the embedding; {_FIX}"
            )
        weight = f"{self.embedding}weight"
        if weight in header and f"{self.head}weight" not in header and saved:
            raise AdapterError(
                f"{file}: {weight} was trained but {self.head}weight was not: PEFT untied them, but"
                " this model ties them; train it with ensure_weight_tying=True"
            )
        return kept


_BASE_WEIGHTS = ("weight", "base_layer.weight", "token_adapter.base_layer.weight")


def tie_of(prefix: str, model: Pretrained, params: Mapping[str, Any]) -> tuple[Tie | None, Any]:
    """Return the names and the leaf of an embedding that is tied to the language-model head.

    Both are None if the head is not tied. PEFT unties the two if only one is saved, and keeps them
    tied with `ensure_weight_tying` and a copy under `lm_head`.

    Args:
        prefix: prefix of the base's module names in the file.
        model: the model to adapt.
        params: its parameters.
    """
    if model.options.task != "causal_lm" or "lm_head" in params:
        return None, None
    words = word_embedding(params)
    leaf = paths.get(params, words.path)["embedding"]
    return Tie(f"{prefix}{words.name}.", f"{prefix}lm_head."), leaf
