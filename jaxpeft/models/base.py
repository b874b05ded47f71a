"""The interface of architecture families: building from a Hugging Face config, and checkpoint
names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpeft.core.paths import Path, Tree
from jaxpeft.errors import ConfigError, show
from jaxpeft.remat import REMAT_POLICIES

LARGEST = 1 << 24
"""The upper limit of model sizes, so that an invalid config cannot exhaust the memory."""
MOST_LAYERS, MOST_HEADS = 10_000, 1 << 16
_MOST_LABELS = 1_000_000
_FLOAT32 = 3.4e38


@dataclass(frozen=True)
class ModelOptions:
    """How a model is used; the architecture is in its config.

    Attributes:
        task: `causal_lm`, `sequence_classification`, `token_classification` or `encoder`.
        num_labels: number of outputs of a classification head.
        dtype: dtype of the activations.
        scan_layers: whether to scan one layer, or each repeating pattern of unequal layers,
            instead of unrolling all layers.
        pooling: the sequence classifier's input: `pooler`, `cls`, `mean`, `last`, or None for the
            architecture's own.
        remat: what the backward pass recomputes: a key of `jaxpeft.remat.REMAT_POLICIES`.
        attention: the attention kernel, used where applicable: a key of
            `jaxpeft.models.attention.KERNELS`.
        right_padded: whether rows are only padded on the right; a decoder then needs no padding
            mask.
        quant: which kernels of the base are quantized, and how (`jaxpeft.Quant`), or None.
        offload: whether the layers' kernels may be in host memory, from which each layer fetches
            its own.
        gathered: pairs of a leaf's path within a layer and the sharding to which it is gathered
            before use; a path may begin with the name of the layers that it belongs to.
    """

    task: str
    num_labels: int | None
    dtype: Any
    scan_layers: bool = False
    pooling: str | None = None
    remat: str = "none"
    attention: str = "xla"
    right_padded: bool = False
    quant: Any = None
    offload: bool = False
    gathered: tuple[tuple[Path, PartitionSpec], ...] = ()


class Pretrained(nn.Module):
    """A pretrained model; called with `(input_ids, attention_mask)` and further inputs by name.

    Attributes:
        config: the architecture, a frozen dataclass read from `config.json`.
        options: how it is used.
        source: where it was loaded from (`jaxpeft.hub.sources.Source`), or None.
    """

    config: Any
    options: ModelOptions
    source: Any = None


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_types: the `model_type` values in `config.json` that it supports.
        build: returns the module; raises `ConfigError` with every unsupported switch.
        prefix: name of the backbone in a model with a head, as in `bert.encoder...`.
        ignored: regular expressions of tensor names, without the prefix, that no task reads.
        optional: the same, for tensors that only some tasks read.
        renamed: `(expression, replacement)` pairs, applied to checkpoint names first.
        own_pooler: name of a pooler tensor that the architecture's own pooling needs, if any.
        embedding: suffix of the word embedding's tensor name.
        fields: names in `config.json` of config fields, where they differ.
        pretrained_heads: head modules that a checkpoint may have without the others.
    """

    model_types: tuple[str, ...]
    build: Callable[[Mapping[str, Any], ModelOptions, str], Pretrained]
    prefix: str
    ignored: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    own_pooler: str | None = None
    embedding: str = "word_embeddings.weight"
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict[str, str])
    pretrained_heads: tuple[str, ...] = ()


class ConfigReader:
    """A reader of `config.json` that collects all unsupported settings.

    Args:
        config: its content.
        defaults: defaults of this architecture.
        problems: known problems, which are raised with the rest.
        where: path of the file, for messages.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        defaults: Mapping[str, Any],
        problems: Sequence[str] = (),
        where: str = "config.json",
    ) -> None:
        self._config, self._defaults, self._others, self._where = (
            config,
            defaults,
            tuple(problems),
            where,
        )
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        """Return the value of a key, or its default."""
        return self._config.get(key, self._defaults.get(key))

    def integer(self, key: str, least: int = 1, most: int = LARGEST) -> int:
        """Return an integer; record a problem if it is not one or out of range."""
        value = self.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        large = isinstance(value, int) and not isinstance(value, bool) and value > most
        bound = f"at most {most}" if large else f"at least {least}"
        self.problems.append(f"{key}: must be an integer of {bound}, is {show(value)}")
        return max(least, 1)

    def number(self, key: str) -> float:
        """Return a nonnegative number; record a problem if it is not one."""
        value = self.get(key)
        return 0.0 if _is_number(value) and value == 0 else self.positive(key, value)

    def positive(self, name: str, value: Any) -> float:
        """Return `value` if it is a positive float32; else record a problem under `name`."""
        if _is_number(value) and 0 < value <= _FLOAT32:
            return float(value)
        bound = f" of at most {_FLOAT32}" if _is_number(value) and value > _FLOAT32 else ""
        self.problems.append(f"{name}: must be a positive number{bound}, is {show(value)}")
        return 1.0

    def rate(self, key: str, default: float = 0.0) -> float:
        """Return a dropout rate, `default` if null; record a problem if it is not in [0, 1)."""
        value = self.get(key)
        if value is None:
            return default
        if _is_number(value) and 0 <= value < 1:
            return float(value)
        self.problems.append(f"{key}: must be a rate of at least 0 and below 1, is {show(value)}")
        return default

    def flag(self, key: str) -> bool:
        """Return a boolean, false if null; record a problem if it is not one."""
        value = self.get(key)
        if not isinstance(value, bool | None):
            self.problems.append(f"{key}: must be true or false, is {show(value)}")
        return bool(value)

    def one_of(self, key: str, known: Mapping[str, Any]) -> str:
        """Return a name in `known`; record a problem if it is not in it."""
        value = self.get(key)
        if isinstance(value, str) and value in known:
            return value
        self.problems.append(
            f"{key}: {show(value)} is not supported (supported: {', '.join(known)})"
        )
        return next(iter(known))

    def refuse(self, key: str, why: str) -> None:
        """Record a problem if a switch is on."""
        if self.get(key):
            self.problems.append(f"{key}: {show(self.get(key))} is not supported: {why}")

    def check_quantization(self, *others: str) -> None:
        """Record a problem if the checkpoint is quantized, except to NF4 by `bitsandbytes`.

        Args:
            *others: further methods of quantization that the architecture reads.
        """
        found: Any = self.get("quantization_config")
        if not found:
            return
        settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        if settings.get("quant_method") in others:
            return
        if (
            settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else None)
            != "bitsandbytes"
        ):
            blocks = settings.get("weight_block_size")
            fix = "load the unquantized model"
            if settings.get("quant_method") == "fp8" and blocks:
                fix = (
                    f"each block of {show(blocks)} weights has a scale of its own"
                    " (weight_scale_inv), but the format fp8 has one scale for each output, which"
                    " cannot hold them exactly; load the weights converted to bfloat16, with"
                    " quant='fp8' or 'nf4' if they are too large"
                )
            self.refuse("quantization_config", fix)
            return
        kind, instead = (
            settings.get("bnb_4bit_quant_type", "fp4"),
            "load the unquantized model with quant=",
        )
        if settings.get("load_in_8bit"):
            self.problems.append(
                f"quantization_config: load_in_8bit is not supported; {instead}'int8'"
            )
        elif not settings.get("load_in_4bit"):
            self.problems.append(
                "quantization_config: only load_in_4bit of bitsandbytes is supported;"
                f" {instead}'nf4'"
            )
        elif kind != "nf4":
            self.problems.append(
                f"quantization_config: bnb_4bit_quant_type {show(kind)} is not supported;"
                f" {instead}'nf4'"
            )

    def finish(self) -> None:
        """Raise an error if there are problems.

        Raises:
            ConfigError: It lists every problem.
        """
        kind = self._config.get("model_type")
        found = [
            f"{self._where} of a {kind} model: {problem}"
            for problem in dict.fromkeys(self.problems)
        ]
        if found or self._others:
            raise ConfigError([*self._others, *found])


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def with_pooling(options: ModelOptions, own: str) -> ModelOptions:
    """Set the pooling to the architecture's own if it is None, so that both are equivalent."""
    if options.task != "sequence_classification" or options.pooling is not None:
        return options
    return dataclasses.replace(options, pooling=own)


def option_problems(
    options: ModelOptions, model_type: str, tasks: Sequence[str], poolings: Sequence[str]
) -> list[str]:
    """List the problems with the task, labels, pooling or remat policy for an architecture.

    Args:
        options: the options.
        model_type: the architecture.
        tasks: its tasks.
        poolings: poolings of its sequence classifier.
    """
    task, pooling = options.task, options.pooling
    labels: Any = options.num_labels
    problems: list[str] = []
    if task not in tasks:
        problems.append(
            f"task: {task!r} is not supported by a {model_type} model (it has {', '.join(tasks)})"
        )
    integer = isinstance(labels, int) and not isinstance(labels, bool)
    if "classification" in task and (not (integer and 1 <= labels <= _MOST_LABELS)):
        bound = f"most {_MOST_LABELS}" if integer and labels > 1 else "least 1"
        problems.append(f"num_labels: must be at {bound}, is {show(labels)}")
    if "classification" not in task and labels is not None:
        problems.append(f"num_labels: is {show(labels)}, but task {task!r} has no labels")
    if pooling is not None and pooling not in poolings:
        problems.append(
            f"pooling: {pooling!r} is not supported by a {model_type} model (it has"
            f" {', '.join(poolings)})"
        )
    elif pooling is not None and task != "sequence_classification":
        problems.append(f"pooling: needs task 'sequence_classification', but task is {task!r}")
    if options.remat not in REMAT_POLICIES:
        problems.append(f"remat: must be one of {', '.join(REMAT_POLICIES)}, is {options.remat!r}")
    return problems


PAST = "past"
"""The mutable collection for the keys and values of each layer, `[2, batch, length, kv_heads * d]`.
"""

ROUTING = "routing"
"""The mutable collection for the numbers of the load-balancing loss of each layer."""


def abstract_params(model: Pretrained) -> Tree:
    """Return the shapes and dtypes of a model's parameters without allocating them."""
    known: Any = model  # flax makes its modules hashable
    return jax.tree.map(lambda leaf: leaf, _traced_params(known))  # a tree of the caller's own


@lru_cache(maxsize=8)
def _traced_params(model: Pretrained) -> Tree:
    ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    return jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
