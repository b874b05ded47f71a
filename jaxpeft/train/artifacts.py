"""Settings and tokenizer that are saved with a run's adapter; the tokenizer has the chat template
used in training.
"""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import Config, as_dict
from jaxpeft.data.examples.labeling import Labeling
from jaxpeft.data.examples.make import CHATS
from jaxpeft.data.pipeline import Splits
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.hub.adapters.settings import DATA_OPTIONS, Settings

_PROBLEM_TYPES = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
_INSPECTED_ROWS = 100
"""Number of rows inspected to find the token that ends an answer."""


@dataclass(frozen=True)
class RunArtifacts:
    """Artifacts that accompany a run's adapter.

    Attributes:
        settings: settings that the model's config does not contain.
        tokenizer: tokenizer to save.
        kind: format of the rows.
        pairs: whether a row has two texts.
        chats: whether rows are formatted with a chat template.
    """

    settings: Settings
    tokenizer: Any
    kind: str
    pairs: bool
    chats: bool


def collect_artifacts(config: Config, splits: Splits) -> RunArtifacts:
    """Return the artifacts that accompany a run's adapter."""
    examples = splits.examples
    settings = Settings(
        labels=examples.label_names,
        problem_type=_PROBLEM_TYPES.get(splits.problem),
        separator=config.data.separator if examples.kind == "prompt_completion" else None,
        data=_reading(config, examples.labeling),
        pad_token_id=splits.pad_id,
        eos_token_id=(
            _end_of_answers(splits.train, splits.tokenizer) if examples.kind in CHATS else None
        ),
    )
    used = splits.encoding.chat_template(examples)
    tokenizer = _with_template(splits.tokenizer, used)
    return RunArtifacts(
        settings, tokenizer, examples.kind, examples.pairs is not None, used is not None
    )


def _reading(config: Config, labeling: Labeling) -> dict[str, Any]:
    """Return the data options to record, as plain values; the labels if integers are their ids."""
    chosen = as_dict(config)["data"]
    usual = as_dict(Config())["data"]
    found = {name: chosen[name] for name in DATA_OPTIONS if chosen[name] != usual[name]}
    labels = {"labels": list(labeling.names)} if labeling.origin else {}
    return {**found, "max_length": config.data.max_length, **labels}


def answer_ends(tokenizer: Any) -> set[int]:
    """Return the ids of special tokens, which include end-of-turn tokens such as `<|im_end|>`."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return special | set(tokenizer.all_special_ids)


def _end_of_answers(rows: Encoded, tokenizer: Any) -> int | None:
    """Return the special token that ends most answers (a newline may follow it), or None."""
    ends, found = answer_ends(tokenizer), Counter[int]()
    for start, stop in zip(rows.offsets[:_INSPECTED_ROWS], rows.offsets[1:], strict=False):
        last = rows.tokens[start:stop][rows.labels[start:stop] >= 0][-2:].tolist()
        found.update([token for token in last if token in ends][-1:])
    return found.most_common(1)[0][0] if found else None


def _with_template(tokenizer: Any, used: Any) -> Any:
    """Return a tokenizer with the chat templates used in training; keep its other templates."""
    if used is None:
        return tokenizer
    own, copied = tokenizer.chat_template, copy.deepcopy(tokenizer)
    several = isinstance(used, dict) or isinstance(own, dict)
    copied.chat_template = _by_name(own) | _by_name(used) if several else used
    return copied


def _by_name(template: Any) -> dict[str, str]:
    return (
        {}
        if template is None
        else {"default": template}
        if isinstance(template, str)
        else dict(template)
    )
