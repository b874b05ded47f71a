"""Regular expressions: what is none is said, and what would never end is refused in time."""

from __future__ import annotations

import time

import pytest

from jaxpeft.core.expressions import broken_expression, require_fast
from jaxpeft.errors import TargetError

NAMES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(30) for name in "qkvo"]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "missing ), unterminated subpattern"),
        ("*x", "nothing to repeat"),
        ("a{99999999999}", "the repetition number is too large"),
        ("a" * 1001, "is a regular expression of 1,001 characters; at most 1,000 are taken"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_expression_is_said(text: str, why: str) -> None:
    assert why in str(broken_expression(text))


@pytest.mark.parametrize("value", [r".*\.[qv]_proj", "q_proj", "", None, ("q_proj",)])
def test_what_is_one_or_no_text_passes(value: object) -> None:
    assert broken_expression(value) is None


@pytest.mark.parametrize("slow", ["(.*.*)*x", r"(\w+\.?)+[A-Z]", "((m|o|d|e|l|.)+)+!"])
def test_one_that_takes_too_long_is_refused_by_name(slow: str) -> None:
    began = time.perf_counter()
    with pytest.raises(TargetError) as caught:
        require_fast("exclude", {"q_proj": "q_proj", ".*": ".*", slow: slow}, NAMES)
    assert str(caught.value) == (
        f"exclude: the regular expression {slow!r} takes more than 2 s on the names of the model's modules; write it without "
        "repetitions inside repetitions"
    )
    assert time.perf_counter() - began < 60  # 2 s of the processor's time; the machine may be busy


def test_usual_ones_pass() -> None:
    usual = [r".*\.(q|v)_proj", r"^(?!.*lm_head).*proj$", r"model\.layers\.\d+\..*", ".*"]
    require_fast("targets", {text: text for text in usual}, NAMES)
