"""What a run decides that goes with its adapter: the settings, and the tokenizer with the chat
template that was trained with.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import Config
from jaxpeft.data.examples.make import CHATS
from jaxpeft.data.pipeline import Splits
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.hub.adapters.settings import Settings

_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_LOOKED_AT = 100
"""How many rows are looked at for the token that ends an answer."""


@dataclass(frozen=True)
class Decided:
    """What goes with the adapter of a run.

    Attributes:
        settings: beyond what the model says itself.
        tokenizer: as it is to be saved.
        kind: the format of the rows.
        pairs: whether a row has two texts.
        chats: whether rows are written by a chat template.
    """

    settings: Settings
    tokenizer: Any
    kind: str
    pairs: bool
    chats: bool


def decide(config: Config, splits: Splits) -> Decided:
    """Return what goes with the adapter of a run."""
    examples = splits.examples
    settings = Settings(
        labels=examples.label_names,
        problem_type=_PROBLEM_TYPES.get(splits.problem),
        separator=config.data.separator if examples.kind == "prompt_completion" else None,
        pad_token_id=splits.pad_id,
        eos_token_id=(
            _end_of_answers(splits.train, splits.tokenizer) if examples.kind in CHATS else None
        ),
    )
    used = splits.encoding.chat_template(examples)
    tokenizer = _with_template(splits.tokenizer, used)
    return Decided(settings, tokenizer, examples.kind, examples.pairs is not None, used is not None)


def answer_ends(tokenizer: Any) -> set[int]:
    """Return the special tokens, of which the ends of a chat's turns are some: `<|im_end|>`,
    `<end_of_turn>`.
    """
    marks = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return marks | set(tokenizer.all_special_ids)


def _end_of_answers(rows: Encoded, tokenizer: Any) -> int | None:
    """Return the special token that most answers end with, a line's end behind it or not; None
    where they end with none.
    """
    ends, found = answer_ends(tokenizer), Counter[int]()
    for start, stop in zip(rows.offsets[:_LOOKED_AT], rows.offsets[1:], strict=False):
        learned = rows.tokens[start:stop][rows.labels[start:stop] >= 0][-2:].tolist()
        found.update([token for token in learned if token in ends][-1:])
    return found.most_common(1)[0][0] if found else None


def _with_template(tokenizer: Any, used: Any) -> Any:
    """Return a tokenizer that writes chats by the templates that were trained with; others that it
    has stay.
    """
    if used is None:
        return tokenizer
    own, made = tokenizer.chat_template, copy.deepcopy(tokenizer)
    several = isinstance(used, dict) or isinstance(own, dict)
    made.chat_template = _by_name(own) | _by_name(used) if several else used
    return made


def _by_name(template: Any) -> dict[str, str]:
    return (
        {}
        if template is None
        else {"default": template}
        if isinstance(template, str)
        else dict(template)
    )
