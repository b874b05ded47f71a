"""What a column may be meant for, told from its name and from what it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

AN_OPTION, HOW_GOOD, A_WEIGHT = (
    "an option to choose from",
    "how good the answer is",
    "a weight of the row",
)
_MEMBER = re.compile(r"(.*?)[ _.-]?([A-Za-z]|[0-9]+)\)?")
_BEGINNINGS = ({"a", "b"}, {"0", "1"}, {"1", "2"})
_WORD = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # of a name written asCamel
ROLES: Mapping[str, frozenset[str]] = {
    role: frozenset(words.split())
    for role, words in {
        "": (
            "id ids idx index unnamed uuid guid pid url uri link links hash md5 sha path file"
            " filename date time timestamp year created updated split fold subset source sources"
            " origin original raw seed lang language license author meta metadata version count num"
            " number len length type kind domain difficulty level model task config dataset name"
            " user annotator worker"
        ),
        "an image or a sound": "image images img pixel pixels audio audios video videos speech",
        "a thought before the answer": (
            "reasoning rationale rationales explanation explanations thought thoughts thinking"
            " think cot scratchpad justification"
        ),
        "the answer": (
            "answer answers output outputs response responses completion completions target targets"
            " solution solutions code program summary summaries highlights abstract translation"
            " translations chosen rejected reply replies gold truth expected result results sql"
            " rewrite rewritten paraphrase correction corrected generation generations generated"
            " continuation caption captions"
        ),
        "a system turn": "system persona",
        "earlier turns": "history",
        "tools": "tools tool functions function",
        "tests of the answer": "test tests",
        "a part of the question": (
            "context contexts passage passages choice choices option options ending endings"
            " document documents article input inputs question questions query queries evidence"
            " evidences instruction instructions table schema knowledge problem hint hints fact"
            " facts clue clues distractor distractors background support dialogue dialog"
            " conversation transcript"
        ),
        "the prompt": "prompt prompts",
        A_WEIGHT: "weight weights",
        HOW_GOOD: (
            "label labels score scores rating ratings reward rewards rank ranking quality correct"
            " correctness accepted desirable helpfulness preference preferred winner vote votes"
            " upvotes feedback"
        ),
        "a class": (
            "category categories topic topics class classes intent intents sentiment emotion"
        ),
        "a second text": (
            "text texts title sentence sentence1 sentence2 body content headline premise hypothesis"
            " aspect description"
        ),
    }.items()
}
"""What a column may be meant for, told from a word of its name; the first that fits. Nothing is
missed without those of "".
"""


def role(column: str, held: type = str) -> str | None:
    """Return what a column may be meant for: empty where nothing is missed without it, None where
    its name does not say.

    Args:
        column: its name.
        held: the type of its values. Numbers and truths are how good something is, a weight, or
            what all words of the name say.
    """
    words = {word.lower() for word in [*_WORD.findall(column), *_HUMP.findall(column)]}
    if not words:
        return ""
    fitting = [role for role, known in ROLES.items() if words & known]
    if held in (bool, int, float):
        fitting = [
            role for role in fitting if role in ("", HOW_GOOD, A_WEIGHT) or words <= ROLES[role]
        ]
    return next(iter(fitting), None)


def roles(present: Mapping[str, type], asked: Iterable[str]) -> dict[str, str | None]:
    """Return the role of columns; of those that say nothing by themselves, `A`, `B` and so on are
    options.

    Args:
        present: the columns that hold something, each with the type of a value.
        asked: the columns to tell of.
    """
    found = {column: role(column, present[column]) for column in asked}
    series: dict[str, dict[str, str]] = {}
    for column, meant in found.items():
        match = _MEMBER.fullmatch(column) if meant is None else None
        if match and (match[1] or match[2].isalpha()):
            series.setdefault(match[1].lower(), {})[match[2].lower()] = column
    for members in series.values():
        if any(begins <= members.keys() for begins in _BEGINNINGS):
            found |= dict.fromkeys(members.values(), AN_OPTION)
    return found
