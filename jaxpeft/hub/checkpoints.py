"""Which leaves a checkpoint contains, in which dtypes, and which of them are quantized.

`SafetensorsCheckpoint` reads this from the tensors; `DescribedCheckpoint`, which a plan uses, from
`config.json` alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft.choices import DTYPES
from jaxpeft.core import paths
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.sources import Source
from jaxpeft.hub.weights import bitsandbytes, expert_tensors, leaf_tensors
from jaxpeft.hub.weights.safetensors_files import Meter, open_folder
from jaxpeft.models.base import Family, Pretrained
from jaxpeft.quant.quantize import Quant


@dataclass(frozen=True)
class SafetensorsCheckpoint:
    """A checkpoint in a folder of safetensors files.

    Attributes:
        source: its folder.
        config: the content of its `config.json`.
        tensors: the tensors by name; their data is not read yet.
        meter: counts the bytes read from it.
    """

    source: Source
    config: Mapping[str, Any]
    tensors: leaf_tensors.Tensors
    meter: Meter

    @classmethod
    def open(cls, source: Source, config: Mapping[str, Any]) -> SafetensorsCheckpoint:
        """Return the checkpoint in a folder.

        Raises:
            WeightsError: A file is missing, or is not safetensors.
        """
        meter = Meter()
        return cls(source, config, bitsandbytes.gather(open_folder(source.folder, meter)), meter)

    @property
    def where(self) -> str:
        """The path of `config.json`, for messages."""
        return str(self.source.folder / "config.json")

    @property
    def dtype(self) -> Any:
        """The dtype of the largest tensor; float32 instead of float64."""
        floats = [t for t in self.tensors.values() if jnp.issubdtype(t.dtype, jnp.floating)]
        own = max(floats, key=lambda t: t.nbytes).dtype if floats else jnp.dtype(jnp.float32)
        return jnp.dtype(jnp.float32) if own == np.float64 else own

    def holds(self, ending: str) -> bool:
        """Return whether the name of a tensor has this ending."""
        return any(name.endswith(ending) for name in self.tensors)

    def require_sizes(self, model: Pretrained, family: Family) -> None:
        """Raise an error if `config.json` describes a larger model than the tensors have.

        Raises:
            WeightsError: Sizes are too large; it lists each of them.
        """
        tensors = expert_tensors.split(self.tensors, model.config)
        leaf_tensors.require_sizes(model.config, tensors, family, self.where)

    def plan(
        self, model: Pretrained, abstract: Tree, family: Family, request: ModelRequest
    ) -> leaf_tensors.WeightPlan:
        """Match the leaves of a model to the tensors.

        Raises:
            WeightsError: Tensors do not fit; it lists all of them.
        """
        tensors, folder = expert_tensors.split(self.tensors, model.config), self.source.folder
        ignored = (*family.ignored, *getattr(model.config, "ignored", ()))
        family = dataclasses.replace(family, ignored=ignored)
        if request.task == "causal_lm" and model.config.tie_word_embeddings:
            tensors = leaf_tensors.untie(tensors, folder)
        return leaf_tensors.plan(
            abstract, tensors, family, request.dtype, folder, relabel=request.num_labels is not None
        )

    def quant(
        self, abstract: Tree, plan: leaf_tensors.WeightPlan, asked: Quant | None
    ) -> Quant | None:
        """Return which kernels are quantized, and how: as in the checkpoint, else as requested.

        Raises:
            WeightsError: `config.json` says that the tensors are quantized, but none is.
            ConfigError: The checkpoint is quantized differently than requested.
        """
        if not plan.held and not self.config.get("quantization_config"):
            return asked
        folder = self.source.folder
        if not plan.held:
            raise WeightsError(
                f"{folder}: config.json has a quantization_config, but no tensor is quantized;"
                f" remove it, and set quant={_form(self.config)!r} to quantize the weights"
            )
        form = plan.form or "nf4"
        found = Quant.of(form, abstract, plan.held.keys())
        if asked not in (None, Quant(form), found):
            raise ConfigError(
                f"quant: is {asked}, but {folder} is already quantized, as {found}; omit quant, or"
                " use the unquantized model"
            )
        return found


@dataclass(frozen=True)
class DescribedCheckpoint:
    """A checkpoint described by its `config.json` alone.

    It is assumed to contain every leaf in the dtype of `config.json`, but no classification head.

    Attributes:
        config: the content of its `config.json`.
        meter: always 0, since nothing is read.
    """

    config: Mapping[str, Any]
    meter: Meter = field(default_factory=Meter)
    source: Source | None = None
    where = "config.json"

    @property
    def dtype(self) -> Any:
        """The dtype given in `config.json`; float32 if there is none.

        Raises:
            ConfigError: The dtype is not supported.
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
        """Return True: every tensor of the architecture is assumed to exist."""
        return True

    def require_sizes(self, model: Pretrained, family: Family) -> None:
        """Do nothing: there are no tensors to compare with."""

    def plan(
        self, model: Pretrained, abstract: Tree, family: Family, request: ModelRequest
    ) -> leaf_tensors.WeightPlan:
        """Return the plan for a checkpoint that has every leaf."""
        dtype = request.dtype if request.dtype is not None else self.dtype
        return leaf_tensors.plan_without_tensors(
            abstract, dtype, new_head=request.task != "causal_lm"
        )

    def quant(
        self, abstract: Tree, plan: leaf_tensors.WeightPlan, asked: Quant | None
    ) -> Quant | None:
        """Return the requested quantization, else that of `config.json`, or None.

        Kernels in MXFP4 are those of experts.
        """
        if asked or not self.config.get("quantization_config"):
            return asked
        form = _form(self.config)
        if form != "mxfp4":
            return Quant(form)
        experts = {p for p, _ in paths.walk(abstract) if paths.EXPERTS in p and p[-1] == "kernel"}
        return Quant.of(form, abstract, experts)


def _form(config: Mapping[str, Any]) -> str:
    """Return the format that a `config.json` with a `quantization_config` names."""
    settings: Any = config["quantization_config"]
    return "mxfp4" if settings.get("quant_method") == "mxfp4" else "nf4"


Checkpoint = SafetensorsCheckpoint | DescribedCheckpoint
