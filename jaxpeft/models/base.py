"""What every architecture family gives: how it is built from a Hugging Face config, and what its checkpoints call things."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from jaxpeft.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """How a model is used; the architecture itself is in its config.

    Attributes:
        task: `causal_lm`, `sequence_classification`, `token_classification` or `encoder`.
        num_labels: outputs of a classification head.
        dtype: of the activations.
        scan_layers: one scanned layer in place of unrolled layers.
        pooling: what a sequence classifier reads: `pooler`, `cls`, `mean`, `last`, or None for the architecture's own.
        remat: what the backward pass computes again: `none`, `full`, `attention`, `dots`.
    """

    task: str
    num_labels: int | None
    dtype: Any
    scan_layers: bool = False
    pooling: str | None = None
    remat: str = "none"


class Pretrained(nn.Module):
    """A pretrained model; called with `(input_ids, attention_mask)` and further inputs by name.

    Attributes:
        config: the architecture, a frozen dataclass read from `config.json`.
        options: how it is used.
        source: where it was loaded from (`jaxpeft.hub.sources.Source`), None where it was not.
    """

    config: Any
    options: Options
    source: Any = None


@dataclass(frozen=True)
class Family:
    """One architecture family.

    Attributes:
        model_types: the `model_type` values of `config.json` that it serves.
        build: makes the module; raises `ConfigError` listing every switch that is not supported.
        prefix: name of the backbone in a model with a head, as in `bert.encoder...`.
        ignored: expressions of checkpoint tensor names that may be left over.
        renamed: `(expression, replacement)` applied to checkpoint names first.
        own_pooler: name of a tensor of the pooler that the architecture's own pooling needs, if any.
    """

    model_types: tuple[str, ...]
    build: Callable[[Mapping[str, Any], Options], Pretrained]
    prefix: str
    ignored: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    own_pooler: str | None = None


class ConfigReader:
    """Reads a `config.json`, collecting everything that is not supported.

    Args:
        config: its content.
        defaults: what absent keys mean for this architecture.
    """

    def __init__(self, config: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self._config, self._defaults = config, defaults
        self.problems: list[str] = []

    def get(self, key: str) -> Any:
        """Gives the value of a key, or its default."""
        return self._config.get(key, self._defaults.get(key))

    def number(self, key: str) -> Any:
        """Gives a number; notes a problem if it is not one."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.problems.append(f"{key}: must be a number, is {value!r}")
            return 1
        return value

    def one_of(self, key: str, known: Mapping[str, Any]) -> Any:
        """Gives a name in `known`; notes a problem if it is not."""
        value = self.get(key)
        if value not in known:
            self.problems.append(f"{key}: {value!r} is not supported (supported: {', '.join(known)})")
        return value

    def refuse(self, key: str, why: str) -> None:
        """Notes a problem if a switch is on."""
        if self.get(key):
            self.problems.append(f"{key}: {self.get(key)!r} is not supported: {why}")

    def finish(self) -> None:
        """Raises what was found.

        Raises:
            ConfigError: every problem.
        """
        if self.problems:
            kind = self._config.get("model_type")
            raise ConfigError([f"config.json of a {kind} model: {problem}" for problem in self.problems])


def check_options(options: Options, model_type: str, tasks: tuple[str, ...], poolings: tuple[str, ...]) -> None:
    """Refuses a task or pooling that an architecture does not have.

    Raises:
        ConfigError: every problem.
    """
    problems: list[str] = []
    if options.task not in tasks:
        problems.append(f"task: {options.task!r} is not one of a {model_type} model (it has {', '.join(tasks)})")
    if "classification" in options.task and not (options.num_labels and options.num_labels > 0):
        problems.append(f"num_labels: must be at least 1, is {options.num_labels}")
    if options.pooling is not None and options.pooling not in poolings:
        problems.append(f"pooling: {options.pooling!r} is not one of a {model_type} model (it has {', '.join(poolings)})")
    if options.remat not in REMAT_POLICIES:
        problems.append(f"remat: must be one of {', '.join(REMAT_POLICIES)}, is {options.remat!r}")
    if problems:
        raise ConfigError(problems)


REMAT_POLICIES = ("none", "full", "attention", "dots")
