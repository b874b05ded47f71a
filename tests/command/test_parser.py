"""Arguments of a command: typed, bounded, and wrong ones named all at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest

from jaxpeft.command.parser import Arguments, ConfigArguments, argument_docs, read_arguments
from jaxpeft.command.verbs import command_line
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Some(ConfigArguments):
    count: int = option(1, "how many", at_least=0)
    share: float | None = option(None, "of all", above=0)
    to: Literal["peft", "merged"] | None = option(None, "what to write")
    allow_change: tuple[str, ...] = option((), "fields")
    parts: tuple[str, ...] | None = option(None, "some")
    folder: str | None = option(None, "where")
    quick: bool = option(False, "whether")


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--count=3"], "count", 3),
        (["--count", "0"], "count", 0),
        (["--count", "3", "--count", "4"], "count", 4),
        (["--share=1e-3"], "share", 1e-3),
        (["--share=2"], "share", 2.0),
        (["--to=peft"], "to", "peft"),
        (["--allow-change=a.b", "--allow_change", "c"], "allow_change", ("a.b", "c")),
        (["--parts=a,b", "--parts=c"], "parts", ("a", "b", "c")),
        (["--parts="], "parts", ()),
        ([], "parts", None),
        (["--folder=none"], "folder", "none"),
        (["--folder=7"], "folder", "7"),
        (["--folder=a=b"], "folder", "a=b"),
        (["--quick"], "quick", True),
        (["--quick=false"], "quick", False),
        (["--quick", "--count=2"], "quick", True),
        ([], "quick", False),
    ],
)
def test_text_becomes_what_the_argument_is(words: list[str], field: str, value: object) -> None:
    given, overrides = read_arguments(Some, words)
    assert getattr(given, field) == value
    assert type(getattr(given, field)) is type(value)
    assert overrides == ()


def test_options_of_the_config_are_kept_apart_in_their_order() -> None:
    words = [
        "--config=a.py",
        "--config.train.steps=3",
        "--quick",
        "--config.data.train",
        "b c",
        "-config.method.rank=2",
    ]
    given, overrides = read_arguments(Some, words)
    assert given.config == "a.py"
    assert overrides == (("train.steps", "3"), ("data.train", "b c"), ("method.rank", "2"))


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--cuont=3"], "--cuont: no such option; did you mean '--count'"),
        (["--coun=3"], "--coun: no such option; did you mean '--count'"),  # no abbreviations
        (["--other", "3"], "--other: no such option; did you mean"),
        (["stray"], "'stray': not an option; see --help"),
        (["--count=x"], "--count: must be an integer, is 'x' (str)"),
        (["--count=-1"], "--count: must be at least 0, is -1"),
        (["--count=99999999999"], "--count: must be at most 2147483647, is 99999999999"),
        (["--share=nan"], "--share: must be a number or None, is 'nan'"),
        (["--to=pfet"], "--to: must be one of 'peft', 'merged' or None, is 'pfet' (str)"),
        (["--quick=3"], "--quick: must be True or False, is 3 (int)"),
        (["--count"], "--count: expected one argument; see --help"),
        (["--folder=a\0b"], "--folder: must be text without NUL characters"),
        (["--allow-change=a\0b"], "--allow-change[0]: must be text without NUL characters"),
    ],
)
def test_what_is_wrong_is_named(words: list[str], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_arguments(Some, words)
    assert str(refused.value).startswith(text)
    assert len(refused.value.problems) == 1


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as refused:
        read_arguments(Some, ["--nothing", "3", "word", "--count=x", "--share=0"])
    assert [problem.partition(":")[0] for problem in refused.value.problems] == [
        "--nothing",
        "'word'",
        "--count",
        "--share",
    ]


def test_a_command_without_a_config_takes_none() -> None:
    with pytest.raises(ConfigError, match=r"--config\.train\.steps: no such option"):
        read_arguments(Arguments, ["--config.train.steps=3"])


def test_help_names_what_is_the_command_s_own_first() -> None:
    names = [one.name for one in argument_docs(Some)]
    assert names == [
        "config",
        "count",
        "share",
        "to",
        "allow_change",
        "parts",
        "folder",
        "quick",
        "traceback",
        "schema",
    ]


@pytest.mark.parametrize(
    ("verb", "field", "flags"),
    [
        ("generate", "output", ("--output",)),
        ("generate", "model", ("--model", "--base")),
        ("evaluate", "output", ("--output", "--json")),
        ("evaluate", "model", ("--model", "--base")),
        ("report", "output", ("--output", "--out")),
        ("report", "run", ("--run", "--adapter")),
        ("export", "output", ("--output", "--out")),
        ("export", "base", ("--base",)),
        ("export", "model", ("--model",)),
    ],
)
def test_commands_share_the_names_of_their_flags(
    verb: str, field: str, flags: tuple[str, ...]
) -> None:
    for name in flags:
        given, _ = read_arguments(command_line(verb).ARGUMENTS, [f"{name}=x"])
        assert getattr(given, field) == "x"


def test_help_says_how_lists_are_separated() -> None:
    docs = {one.name: one for one in argument_docs(command_line("evaluate").ARGUMENTS)}
    assert docs["metrics"].doc.endswith("; comma separated")
    assert "comma separated" not in docs["output"].doc
