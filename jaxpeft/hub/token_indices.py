"""LoRA and trainable tokens in one adapter folder, as PEFT has them: LoRA's option `trainable_token_indices`.

Here they are a method made of methods: one of LoRA's family, and one `trainable_tokens` for each set of tokens; a `head` among
them, which names modules that are saved whole, adds nothing to the options.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.errors import shown
from jaxpeft.methods.head import Head
from jaxpeft.methods.trainable_tokens import TrainableTokens

OPTION = "trainable_token_indices"
_LORA = "LORA"
_TOKENS = re.compile(r"(\.token_adapter)?(\.trainable_tokens_delta\b)")


def split(method: Method) -> tuple[Method, tuple[TrainableTokens, ...]] | None:
    """Gives the method whose options a folder holds, and the trainable tokens beside it, None where it takes several folders.

    Args:
        method: what is to be saved.
    """
    if method.parts() == (method,):
        return method, ()
    parts = [part for part in method.parts() if not isinstance(part, Head)]
    if len(parts) == 1 and parts[0].layout == method.layout:
        return parts[0], ()
    tokens = tuple(part for part in parts if isinstance(part, TrainableTokens))
    others = [part for part in parts if not isinstance(part, TrainableTokens)]
    return (others[0], tokens) if len(others) == 1 and others[0].peft_type == _LORA and tokens else None


def renamed(text: str) -> str:
    """Turns a tensor's name, or a text that holds it, from that of a folder of trainable tokens alone to that beside LoRA, and back.

    A name that is wrong where it stands stays wrong: it is turned as well.
    """
    return _TOKENS.sub(lambda found: found[2] if found[1] else f".token_adapter{found[2]}", text)


def written(sites: Mapping[str, TrainableTokens]) -> dict[str, Any]:
    """Gives the option.

    Args:
        sites: the trainable tokens of each site, by its Hugging Face name.
    """
    return {OPTION: {name: list(part.tokens) for name, part in sites.items()}}


def read(config: Mapping[str, Any], tied: bool) -> tuple[list[dict[str, Any]], list[str]]:
    """Reads the option.

    Args:
        config: the content of an `adapter_config.json`.
        tied: whether the language-model head is the embedding.

    Returns:
        `(options, problems)`: those of one `trainable_tokens` for each module.
    """
    given = config.get(OPTION)
    if not given:
        return [], []
    by_module: Mapping[Any, Any] = given if isinstance(given, Mapping) else {"default": given}
    problems = [
        f"{OPTION}: must be ids of tokens, or those by the name of a module, is {shown(given)}"
        for name, ids in by_module.items()
        if not (isinstance(name, str) and _are_ids(ids))
    ][:1]
    if problems:
        return [], problems
    # PEFT has the head's rows trained with those of an embedding that it is tied to
    heads = [name for name in by_module if tied and len(by_module) > 1 and name.rpartition(".")[2] == "lm_head"]
    others = [list(ids) for name, ids in by_module.items() if name not in heads]
    problems = [
        f"{OPTION}: {name} is tied to the embedding, and has other tokens; give both the same, or one alone"
        for name in heads
        if list(by_module[name]) not in others
    ]
    return [
        {"name": TrainableTokens.name, "tokens": tuple(ids), "targets": "default" if name == "default" else (name,)}
        for name, ids in by_module.items()
        if name not in heads
    ], problems


def _are_ids(ids: Any) -> bool:
    return isinstance(ids, Sequence) and not isinstance(ids, str) and all(type(i) is int and i >= 0 for i in ids)
