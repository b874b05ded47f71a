"""Regular expressions: what is none is said, what would never end is refused in time, and the rest
is read as by `re`.
"""

from __future__ import annotations

import random
import re
import subprocess
import sys
import time
import warnings

import pytest

from jaxpeft.core import expressions
from jaxpeft.core.expressions import find_expression_fault, full_match, require_fast
from jaxpeft.errors import TargetError

NAMES = [f"model.layers.{i}.self_attn.{name}_proj" for i in range(30) for name in "qkvo"]
SLOW = [
    r"(.|..|...)*[^\w.]",
    r"((m|o|d|e|l|.)+?)+?[^\w.]",
    r"(.{1,30}){1,30}[^\w.]",
    "(?:" * 32 + ".??" + "|.)*?" * 32 + r"[^\w.]",
    "(?:(?:(?:|.){10}){10}){10}" + r"[^\w.]",
    "(?:" + "(.*?)" * 31 + r")*?[^\w.]",
]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "is not a regular expression (missing ), unterminated subpattern"),
        ("*x", "nothing to repeat"),
        ("a{99999999999}", "the repetition number is too large"),
        (r"\p{Lu}", r"is not a regular expression (bad escape \p"),
        ("a" * 1001, "is a regular expression of 1,001 characters; the limit is 1,000"),
        ("(" * 33 + "a" + ")" * 33, "is a regular expression with 33 groups; the limit is 32"),
        (
            "(a{1,1000}){1,1000}",
            (
                "whose repetition {counts} multiply to 1,000,000; the limit is 1,000: use * or + for"
                " a large count"
            ),
        ),
        ("((?:.?){65535}){65535}", "multiply to 4,294,836,225"),
        ("(?:(?:|.){999}){999}", "multiply to 998,001"),
        ("x{1001}", "multiply to 1,001"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_no_expression_or_too_large_is_said(text: str, why: str) -> None:
    began = time.process_time()
    assert why in str(find_expression_fault(text))
    with pytest.raises(TargetError, match=re.escape(why)):
        require_fast("targets", {text: text}, NAMES)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    "value",
    [r".*\.[qv]_proj", "q_proj", "", None, ("q_proj",), "[[a]", "(x{10}){100}", "x{,}", "x{e}"],
)
def test_what_is_one_or_no_text_passes(value: object) -> None:
    assert find_expression_fault(value) is None


@pytest.mark.parametrize("slow", SLOW, ids=lambda value: str(value)[:20])
def test_one_that_takes_too_long_is_refused_by_name(
    slow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.2)  # each would go on for ever
    began = time.process_time()
    with pytest.raises(TargetError) as caught:
        require_fast("exclude", {"q_proj": "q_proj", ".*": ".*", slow: slow}, NAMES)
    assert (
        str(caught.value)
        == f"exclude: the regular expression {slow!r} takes more than 0.2 s to match the"
        " model's module names; avoid nested repetitions"
    )
    assert time.process_time() - began < 4


def test_one_that_has_not_been_tried_is_stopped_too() -> None:
    with pytest.raises(
        TargetError,
        match=re.escape(
            f"the regular expression {SLOW[0]!r} takes more than 2 s to match {NAMES[0]}"
        ),
    ):
        full_match(SLOW[0], NAMES[0], 0.1)


def test_the_names_of_a_model_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.5)
    slow = r"(?:.?){20}.*[^\w.]"
    began = time.process_time()
    with pytest.raises(TargetError, match=r"takes more than 0\.5 s to match the model's module"):
        require_fast("targets", {slow: slow}, NAMES * 10_000)
    assert time.process_time() - began < 4


def test_hostile_ones_take_little_memory() -> None:
    code = (
        "import resource; from jaxpeft.core.expressions import full_match; from jaxpeft.errors"
        " import TargetError\nfrom tests.core.test_expressions import NAMES, SLOW\nbefore ="
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nfor slow in SLOW:\n    try:"
        " full_match(slow, NAMES[0], 0.2)\n    except TargetError:"
        " pass\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 64 << 10  # KiB


def test_usual_ones_pass() -> None:
    usual = [
        r".*\.(q|v)_proj",
        r"^(?!.*lm_head).*proj$",
        r"model\.layers\.\d+\..*",
        ".*",
        r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj)))",
    ]
    require_fast("targets", {text: text for text in usual}, NAMES)


ATOMS = [
    "a",
    "b",
    ".",
    r"\.",
    r"\w",
    r"\d",
    "[a-c]",
    "[^a]",
    "^",
    "$",
    r"\b",
    r"\B",
    r"\A",
    r"\Z",
    "(?i:A)",
    "[[a]",
    "{e}",
    "{i<=1}",
    "a{e<=2}",
    "a{,}",
    "a{}",
    "{,}",
    "a{1,}",
    "[a||b]",
    "[a--b]",
    "[a~~b]",
    "[a&&b]",
    "[[:alpha:]]",
    "[[:alpha:]a]",
    r"\[:",
    "[:]",
    "(?s:.)",
    r"[\w-]",
    r"\N{LATIN SMALL LETTER A}",
    "[]a]",
    "[{]",
    r"\{",
    "}",
    r"\x61",
    r"\141",
    "(?x: a {2})",
    "a{ 2}",
    "a{2, 3}",
    "(?#{e})",
    "#",
    r"\S",
    r"\W",
]
STRINGS = [
    "a",
    "b",
    "ab",
    "a.b",
    "aa",
    "a]",
    "l]",
    ":]",
    "[:",
    "[",
    "{e}",
    "a{e}",
    "aba",
    "a-b",
    "_",
    "a b",
    "a1",
    "A",
    "{",
    "}",
    "a{}",
    "a{,}",
    "aaaa",
    "a|b",
    "&",
    "~",
    "-",
    ":",
    "a{ 2}",
    "a{2, 3}",
    "a{i<=1}",
    "a{e<=2}",
    "#",
    "é",
    "K",
]


def draw(of: random.Random, depth: int) -> str:
    if depth == 0:
        return of.choice(ATOMS)
    first, second = draw(of, depth - 1), draw(of, depth - 1)
    repeat = of.choice(
        ["*", "+", "?", "*?", "+?", "??", "*+", "++", "?+", "{2}", "{1,3}", "{,2}", "{2}?"]
    )
    group = of.choice(["", "?:", "?>", "?=", "?!", "?<=", "?<!", "?P<n>"])
    return of.choice(
        [
            first,
            first + second,
            f"(?:{first}|{second})",
            f"(?:{first}){repeat}",
            f"({group}{first})",
            rf"({first}){second}\1",
        ]
    )


@pytest.mark.parametrize("seed", range(4))
def test_an_expression_is_read_as_re_reads_it(seed: int) -> None:
    of, tried = random.Random(seed), 0
    while tried < 1000:
        text = draw(of, of.randrange(4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if find_expression_fault(text) is not None:
                continue
            compiled = re.compile(text)
        found = [string for string in STRINGS if full_match(text, string)]
        assert found == [string for string in STRINGS if compiled.fullmatch(string)], text
        tried += 1
