"""The identity of a base model: its weights, and the architecture that `config.json` describes.

The identity does not depend on the spelling of `config.json`, on how tensors are split into files,
on the backbone's prefix in their names, on tensors that no task of the architecture reads, or on a
second copy of a tied embedding.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxpeft import models
from jaxpeft.core import paths
from jaxpeft.errors import show
from jaxpeft.hub.sources import Source, file_sha256
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.hub.weights import digests
from jaxpeft.hub.weights.leaf_tensors import plain_name
from jaxpeft.hub.weights.safetensors_files import open_folder
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Family, ModelOptions

_NOT_THE_MODEL = ("transformers_version", "_name_or_path")


def architecture(source: Source) -> dict[str, Any]:
    """Return the architecture that a model's `config.json` describes, as plain values.

    Raises:
        ConfigError: The architecture is not supported.
    """
    return _plain(_architecture(source))


def _architecture(source: Source) -> Any:
    file = source.folder / "config.json"
    options = ModelOptions("encoder", None, None)
    return models.build(read_model_config(source.folder), options, str(file)).config


def _plain(value: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(value)))


def _field_defaults(value: Any) -> dict[str, Any]:
    """Return the defaults of a dataclass's fields as plain values, those of its parts inside."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        own = getattr(value, field.name)
        if dataclasses.is_dataclass(own) and field.default in (dataclasses.MISSING, None):
            found[field.name] = _field_defaults(own)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    plain = {
        name: dataclasses.asdict(default)
        if dataclasses.is_dataclass(default) and not isinstance(default, type)
        else default
        for name, default in found.items()
    }
    return json.loads(json.dumps(plain))


def _filled(values: Mapping[str, Any], usual: Mapping[str, Any]) -> dict[str, Any]:
    """Return values completed by defaults, those of parts inside."""
    return {**usual, **values} | {
        name: _filled(part, usual[name])
        for name, part in values.items()
        if isinstance(part, Mapping) and isinstance(usual.get(name), Mapping)
    }


def fingerprint(
    source: Source,
    share: Callable[[list[str]], list[str]] = lambda own: own,
    part: slice = slice(None),
) -> str:
    """Return the SHA-256 of a model's weights.

    Args:
        source: the model.
        share: gathers the lines of all processes, if several processes share the hashing.
        part: slice of the sorted files that this process hashes.
    """
    if source.sha256 is not None:
        return source.sha256
    family = models.FAMILIES[read_model_config(source.folder)["model_type"]]
    tied = bool(architecture(source).get("tie_word_embeddings"))
    own = [
        f"{name} {found}"
        for file in weight_files(source)[part]
        for name, found in digests.file_tensors_sha256(file).items()
    ]
    lines = {_line(line, family, tied) for line in share(own)} - {None}
    return hashlib.sha256("\n".join(sorted(map(str, lines))).encode()).hexdigest()


def _line(line: str, family: Family, tied: bool) -> str | None:
    """Return the line that is hashed for a tensor; None for a tensor that is not in the base."""
    name, found = line.rsplit(" ", 1)
    plain = plain_name(name, family)
    unread = any(re.fullmatch(pattern, plain) for pattern in family.ignored)
    own = any(re.fullmatch(pattern, plain) for pattern in family.optional)
    if unread or (paths.is_head(tuple(plain.split("."))) and not own):
        return None
    return f"{family.embedding if tied and plain == 'lm_head.weight' else plain} {found}"


def earlier_fingerprint(source: Source) -> str:
    """Return the identity as version 1.0 wrote it: a hash of `config.json` and the weight files."""
    config = {
        k: v for k, v in read_json(source.folder / "config.json").items() if k not in _NOT_THE_MODEL
    }
    lines = [f"{file.name} {file_sha256(file)}" for file in weight_files(source)]
    return hashlib.sha256(
        "\n".join([json.dumps(config, sort_keys=True), *lines]).encode()
    ).hexdigest()


def weight_files(source: Source) -> list[Path]:
    """Return the sorted weight files of a model."""
    return sorted({tensor.file for tensor in open_folder(source.folder).values()})


def differences(
    recorded: str, config: Mapping[str, Any] | None, source: Source, task: str
) -> list[str]:
    """List the differences between a base and the one that an adapter was trained on.

    Args:
        recorded: SHA-256 recorded in the adapter.
        config: architecture recorded in the adapter; None for an earlier version's adapter, whose
            hash includes it.
        source: the base.
        task: task of the adapter.
    """
    if config is None:
        same = recorded == earlier_fingerprint(source)
        hint = (
            "an earlier version of jaxpeft saved the adapter; its hash also depends on the spelling"
            " of config.json and on the weight files"
        )
        return [] if same else [f"base_sha256 is {recorded[:12]}..., and {hint}"]
    own = fingerprint(source)
    found = (
        []
        if recorded == own
        else [f"the weights differ (base_sha256 {recorded[:12]}..., here {own[:12]}...)"]
    )
    current, usual = _architecture(source), _field_defaults(_architecture(source))
    # an earlier version did not record fields that have a default now
    before, now = (
        _computing_fields(each, task) for each in (_filled(config, usual), _plain(current))
    )
    return found + [
        f"{name} was {show(before.get(name))}, config.json has {show(now.get(name))}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _computing_fields(config: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the config fields that affect what a model computes for a task, rope's flattened."""
    rope: Any = config.get("rope")
    unused = {name for name in config if name.endswith("_dropout")} | {"classifier_bias", "rope"}
    # a decoder: no position embeddings, and only its classifier depends on the padding token
    if isinstance(rope, Mapping):
        unused |= set() if rope.get("kind") == "dynamic" else {"max_position_embeddings"}
        unused |= set() if task == "sequence_classification" else {"pad_token_id"}
    kept = {name: value for name, value in config.items() if name not in unused}
    return kept | {
        f"rope.{name}": value for name, value in (rope.items() if isinstance(rope, Mapping) else ())
    }
