"""Trainable tokens in addition to LoRA, stored in PEFT's LoRA option `trainable_token_indices`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core.peft_format import Companion
from jaxpeft.errors import show
from jaxpeft.methods.trainable_tokens import TrainableTokens

_OPTION = "trainable_token_indices"


def _write(sites: Mapping[str, TrainableTokens]) -> dict[str, list[int]]:
    return {name: list(part.tokens) for name, part in sites.items()}


def _read(given: Any, tied: bool) -> tuple[list[dict[str, Any]], list[str]]:
    by_module: Mapping[Any, Any] = given if isinstance(given, Mapping) else {"default": given}
    problems = [
        f"{_OPTION}: must be token ids, or a mapping from module names to token ids, is"
        f" {show(given)}"
        for name, ids in by_module.items()
        if not (isinstance(name, str) and _are_ids(ids))
    ][:1]
    if problems:
        return [], problems
    # PEFT trains the rows of a tied head together with those of the embedding
    heads = [
        name
        for name in by_module
        if tied and len(by_module) > 1 and name.rpartition(".")[2] == "lm_head"
    ]
    others = [list(ids) for name, ids in by_module.items() if name not in heads]
    problems = [
        f"{_OPTION}: {name} is tied to the embedding, but has other tokens; use the same for both,"
        " or only one"
        for name in heads
        if list(by_module[name]) not in others
    ]
    return [
        {
            "name": TrainableTokens.name,
            "tokens": tuple(ids),
            "targets": "default" if name == "default" else (name,),
        }
        for name, ids in by_module.items()
        if name not in heads
    ], problems


def _are_ids(ids: Any) -> bool:
    return (
        isinstance(ids, Sequence)
        and not isinstance(ids, str)
        and all(type(i) is int and i >= 0 for i in ids)
    )


TOKEN_INDICES = Companion(_OPTION, TrainableTokens.name, "token_adapter", _write, _read)
