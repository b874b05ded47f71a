"""Guess the role of a column from its name and the type of its values."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

AN_OPTION, A_RATING, A_WEIGHT = (
    "an option to choose from",
    "a rating of the answer",
    "a weight of the row",
)
_MEMBER = re.compile(r"(.*?)[ _.-]?([A-Za-z]|[0-9]+)\)?")
_SERIES_STARTS = ({"a", "b"}, {"0", "1"}, {"1", "2"})
_WORD = re.compile(r"[^\W_]+")
_HUMP = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")  # a word of a camelCase name
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
        "an image or audio": "image images img pixel pixels audio audios video videos speech",
        "the reasoning before the answer": (
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
        A_RATING: (
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
"""Words of column names for each role; the first matching role counts. Columns with the role "" are
never needed.
"""


def role(column: str, value_type: type = str) -> str | None:
    """Return the likely role of a column: "" if it is never needed, None if unknown.

    Args:
        column: the column name.
        value_type: the type of its values. Numbers and booleans can only be a rating, a weight, or
            a role that matches all words of the name.
    """
    words = {word.lower() for word in [*_WORD.findall(column), *_HUMP.findall(column)]}
    if not words:
        return ""
    fitting = [role for role, role_words in ROLES.items() if words & role_words]
    if value_type in (bool, int, float):
        fitting = [
            role for role in fitting if role in ("", A_RATING, A_WEIGHT) or words <= ROLES[role]
        ]
    return next(iter(fitting), None)


def roles(present: Mapping[str, type], columns: Iterable[str]) -> dict[str, str | None]:
    """Return the likely roles of columns; otherwise unknown series such as `A`, `B` are options.

    Args:
        present: the non-empty columns, each with the type of a value.
        columns: the columns to look up.
    """
    found = {column: role(column, present[column]) for column in columns}
    series: dict[str, dict[str, str]] = {}
    for column, likely in found.items():
        match = _MEMBER.fullmatch(column) if likely is None else None
        if match and (match[1] or match[2].isalpha()):
            series.setdefault(match[1].lower(), {})[match[2].lower()] = column
    for members in series.values():
        if any(start <= members.keys() for start in _SERIES_STARTS):
            found |= dict.fromkeys(members.values(), AN_OPTION)
    return found
