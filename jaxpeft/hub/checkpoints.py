"""What a checkpoint says of a model beside the architecture: which leaves it holds, in which
dtypes, and which of them quantized.

Its tensors say so where they are at hand; a plan, which reads no more of a model than its
`config.json`, takes the word of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.choices import DTYPES
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.sources import Source
from jaxpeft.hub.weights import bitsandbytes, leaf_tensors
from jaxpeft.hub.weights.safetensors_files import Meter, open_folder
from jaxpeft.models.base import Family, Pretrained
from jaxpeft.quant.quantize import Quant


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A checkpoint whose tensors are at hand.

    Attributes:
        source: its folder.
        config: the content of its `config.json`.
        tensors: by name; nothing of their data is read yet.
        meter: counts what is read of it.
    """

    source: Source
    config: Mapping[str, Any]
    tensors: leaf_tensors.Tensors
    meter: Meter

    @classmethod
    def open(cls, source: Source, config: Mapping[str, Any]) -> SafetensorsCheckpoint:
        """Return the checkpoint in a folder.

        Raises:
            WeightsError: a file is missing, or is not safetensors.
        """
        meter = Meter()
        return cls(source, config, bitsandbytes.gather(open_folder(source.folder, meter)), meter)

    @property
    def where(self) -> str:
        """What to call `config.json` in messages."""
        return str(self.source.folder / "config.json")

    @property
    def dtype(self) -> Any:
        """The dtype of the largest tensor, float32 in place of float64."""
        floats = [t for t in self.tensors.values() if jnp.issubdtype(t.dtype, jnp.floating)]
        own = max(floats, key=lambda t: t.nbytes).dtype if floats else jnp.dtype(jnp.float32)
        return jnp.dtype(jnp.float32) if own == np.float64 else own

    def holds(self, ending: str) -> bool:
        """Return whether a tensor's name ends so."""
        return any(name.endswith(ending) for name in self.tensors)

    def require_sizes(self, model: Pretrained, family: Family) -> None:
        """Refuse a `config.json` of a larger model than the tensors are of.

        Raises:
            WeightsError: listing each size.
        """
        leaf_tensors.require_sizes(model.config, self.tensors, family, self.where)

    def plan(
        self, model: Pretrained, abstract: Tree, family: Family, request: ModelRequest
    ) -> leaf_tensors.WeightPlan:
        """Match the leaves of a model to the tensors.

        Raises:
            WeightsError: listing every tensor that does not fit.
        """
        tensors, folder = self.tensors, self.source.folder
        if request.task == "causal_lm" and model.config.tie_word_embeddings:
            tensors = leaf_tensors.untie(tensors, folder)
        return leaf_tensors.plan(
            abstract, tensors, family, request.dtype, folder, relabel=request.num_labels is not None
        )

    def quant(
        self, abstract: Tree, plan: leaf_tensors.WeightPlan, asked: Quant | None
    ) -> Quant | None:
        """Return which kernels are quantized, and how: in the tensors, else as was asked.

        Raises:
            WeightsError: `config.json` says that the tensors are quantized, and none is.
            ConfigError: they are, and others are asked for.
        """
        if not plan.held and not self.config.get("quantization_config"):
            return asked
        folder = self.source.folder
        if not plan.held:
            raise WeightsError(
                f"{folder}: quantization_config of config.json says that the weights are quantized,"
                " and none is; remove it there, and give quant='nf4' to quantize them"
            )
        found = Quant.of("nf4", abstract, plan.held.keys())
        if asked not in (None, Quant("nf4"), found):
            raise ConfigError(
                f"quant: is {asked}, and {folder} is quantized already, as {found}; leave quant"
                " out, or give the unquantized model"
            )
        return found


@dataclass(frozen=True)
class DescribedCheckpoint:
    """A checkpoint of which `config.json` alone is at hand: it holds what that says, in its dtype,
    and no head of a classifier.

    Attributes:
        config: the content of its `config.json`.
        meter: counts nothing.
    """

    config: Mapping[str, Any]
    meter: Meter = field(default_factory=Meter)
    source: Source | None = None
    where = "config.json"

    @property
    def dtype(self) -> Any:
        """The dtype that `config.json` names, float32 where it names none.

        Raises:
            ConfigError: it is none of a base.
        """
        named = str(
            self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        ).removeprefix("torch.")
        if named not in DTYPES:
            raise ConfigError(
                f"config.json: dtype {named!r} is not supported; set config.model.dtype"
            )
        return jnp.dtype(named)

    def holds(self, ending: str) -> bool:
        """Return whether a tensor's name ends so: what the architecture has is there."""
        return True

    def require_sizes(self, model: Pretrained, family: Family) -> None:
        """Refuse nothing: there are no tensors to compare with."""

    def plan(
        self, model: Pretrained, abstract: Tree, family: Family, request: ModelRequest
    ) -> leaf_tensors.WeightPlan:
        """Return what the tensors of such a checkpoint would make."""
        dtype = request.dtype if request.dtype is not None else self.dtype
        return leaf_tensors.plan_without_tensors(
            abstract, dtype, new_head=request.task != "causal_lm"
        )

    def quant(
        self, abstract: Tree, plan: leaf_tensors.WeightPlan, asked: Quant | None
    ) -> Quant | None:
        """Return which kernels are quantized: as was asked, else as `bitsandbytes` does it where
        `config.json` says so.
        """
        return asked or (Quant("nf4") if self.config.get("quantization_config") else None)


Checkpoint = SafetensorsCheckpoint | DescribedCheckpoint
