"""Text of the command line, and values of config files, of any kind: each is a value or a problem,
never another error.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
import typing
from pathlib import Path
from typing import Any

import pytest

from jaxpeft import config as configs
from jaxpeft.config import files
from jaxpeft.config.literals import read_value
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.core.options import convert, hints_of
from jaxpeft.errors import ConfigError
from jaxpeft.methods import METHODS, read

DEEP: list[Any] = []
for _ in range(5000):
    DEEP = [DEEP]
CYCLE: dict[str, Any] = {}
CYCLE["again"] = CYCLE

TEXTS = (
    "[" * 150 + "]" * 150,
    "[" * 5000,
    "{" * 100,
    "(" * 90 + "1," + ")" * 90,
    "-" * 5000 + "1",
    "1+" * 5000 + "1",
    "not " * 5000 + "1",
    "9" * 400,
    "-" + "9" * 400,
    "9" * 5000,
    "0x" + "f" * 5000,
    "1e400",
    "nan",
    "99999999999",
    "2147483648",
    "-1",
    "0",
    "1.5",
    "\ud800",
    "'\\ud800'",
    "a\udcffb",
    "1\0",
    "'\\0'",
    "{[]: 1}",
    "{1: []}",
    "{1: 1}",
    "{'a': {'b': 1}}",
    "b'a'",
    "1j",
    "...",
    "{**1}",
    "f'{1}'",
    "'''",
    "\\",
    "'\\d'",
    "a," * 5000,
    ",,,",
    "",
    "  ",
    "None",
    "[None]",
    "(1, (2, 3))",
    "[{'method': {'name': 5}}]",
    "[{'method': {'name': 'lora', 'rank': " + "9" * 400 + "}}]",
    "[[a]]",
    "*",
    "(((((",
    "(" * 900,
    "a{99999999999999999999}",
    "x" * 2000,
)
VALUES = (
    DEEP,
    CYCLE,
    10**400,
    1 << 20000,
    float("nan"),
    float("inf"),
    b"x",
    "\ud800",
    "a\0",
    "x" * 100_000,
    {1, 2},
    range(3),
    object(),
    len,
    Config,
    {1: 2},
    {None: None},
    {"a\0": 1},
    {"x" * 5000: 1},
    [None],
    [[]],
    [{}],
    {},
    (),
    True,
    None,
    -1,
    2**31,
    1.5,
    {"name": 10**400},
    {"name": "lora", "rank": DEEP},
    [{"method": CYCLE}],
    [{1: 2}],
    1j,
)


def hints() -> list[Any]:
    """Return every type that an option of a run or of a method has."""
    sections = [
        hint for hint in typing.get_type_hints(Config).values() if dataclasses.is_dataclass(hint)
    ]
    found = {
        str(hint): hint
        for cls in (Config, *sections, *METHODS.values())
        for hint in hints_of(cls).values()
        if not str(hint).startswith("typing.ClassVar")
    }
    return list(found.values())


def test_any_text_is_a_value_of_any_type_or_a_problem() -> None:
    assert len(hints()) > 25
    for hint, text in itertools.product(hints(), TEXTS):
        _, problems = convert(read_value(text, hint, read), hint, "config.x", read)
        assert all(problem.startswith("config.") and len(problem) < 900 for problem in problems), (
            hint,
            text[:80],
        )
        assert len(problems) < 40, (hint, text[:80])


def test_any_value_of_a_file_is_of_any_type_or_a_problem() -> None:
    for hint, value in itertools.product(hints(), VALUES):
        _, problems = convert(value, hint, "config.x", read)
        assert all(problem.startswith("config.") and len(problem) < 900 for problem in problems), (
            hint,
            type(value),
        )


def test_any_value_of_any_option_is_a_config_or_problems() -> None:
    plain = as_dict(Config())
    options = [
        (section, name)
        for section in plain
        if isinstance(plain[section], dict)
        for name in plain[section]
    ]
    values = itertools.cycle(VALUES)
    for section, name in options:
        _, problems = files.parse_config({**plain, section: {**plain[section], name: next(values)}})
        assert problems  # the model is not set
    for section, value in itertools.product(plain, VALUES[:6]):
        assert files.parse_config({**plain, section: value})[1]


FILE = """
from jaxpeft.config import defaults

def get_config():
    config = defaults()
    config.model.path = "somewhere"
    config.data.train = "rows.jsonl"
    config.train.epochs = 1.0
    return config
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    return path


@pytest.mark.parametrize(
    ("option", "text", "says"),
    [
        (
            "train.batch_size",
            "[" * 5000,
            (
                f"config.train.batch_size: must be an integer, is '{'[' * 79}... (5,002 characters)"
                " (str)"
            ),
        ),
        (
            "train.steps",
            "-" * 5000 + "1",
            "config.train.steps: must be an integer or None, is '----",
        ),
        (
            "optimizer.learning_rate",
            "9" * 400,
            (f"config.optimizer.learning_rate: must fit into a 64-bit float, is {'9' * 80}"),
        ),
        (
            "train.steps",
            "9" * 400,
            f"config.train.steps: must be at most 2147483647, is {'9' * 80}",
        ),
        (
            "data.workers",
            "99999999999",
            "config.data.workers: must be at most 1024, is 99999999999",
        ),
        ("data.max_length", "1" + "0" * 40, "config.data.max_length: must be at most 16777216"),
        ("train.seed", "4294967296", "config.train.seed: must be below 4294967296, is 4294967296"),
        (
            "train.epochs",
            "0x" + "f" * 5000,
            "config.train.epochs: must fit into a 64-bit float, is int that is too large",
        ),
        (
            "data.train",
            "\udcff.jsonl",
            r"config.data.train: must be text in UTF-8, is '\udcff.jsonl'",
        ),
        (
            "data.labels",
            "['a\\0']",
            r"config.data.labels[0]: must be text without NUL characters, is 'a\x00'",
        ),
        ("data.labels", "[0, 1]", "config.data.labels[0]: must be a string, is 0 (int)"),
        ("data.columns", "{[]: 1}", "config.data.columns: must be a mapping, is '{[]: 1}' (str)"),
        ("data.lengths", "1.5," * 500, "config.data.lengths: 495 more of its values are invalid"),
        (
            "method.targets",
            "(" * 900,
            f"targets: '{'(' * 79}... (902 characters) is not a regular expression",
        ),
        (
            "method.name",
            "0x" + "f" * 5000,
            f"config.method.name: '0x{'f' * 77}... (5,004 characters) is not a method",
        ),
        ("a." * 3000 + "b", "1", f"--config.{'a.' * 40}... (6,001 characters): no such option"),
        (
            "method.rank_pattern." + "q" * 3000,
            "-1",
            "config.method.rank_pattern: must be at least 1, is -1",
        ),
    ],
)
def test_it_is_refused_by_its_name_and_its_beginning(
    file: Path, option: str, text: str, says: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(file, [(option, text)])
    assert says in str(caught.value)
    assert max(map(len, caught.value.problems)) < 900


@pytest.mark.parametrize(
    ("option", "ours"),
    [
        ("optimizer.lr", "optimizer.learning_rate"),
        ("train.lr", "optimizer.learning_rate"),
        ("train.bs", "train.batch_size"),
        ("train.num_train_epochs", "train.epochs"),
        ("method.r", "method.rank"),
        ("method.lora_alpha", "method.alpha"),
        ("train.gradient_accumulation_steps", "train.accumulation"),
        ("evaluation.eval_steps", "evaluation.every_steps"),
        ("train.batchsize", "train.batch_size"),
    ],
)
def test_a_usual_name_leads_to_ours(file: Path, option: str, ours: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(file, [(option, "8")])
    assert f"--config.{option}: no such option; did you mean '{ours}'" in str(caught.value)


def test_the_divisors_of_any_batch_are_found_at_once(file: Path) -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError, match="at most 16777216, is 100000000000"):
        configs.load(file, [("train.batch_size", "100000000000"), ("train.accumulation", "3")])
    with pytest.raises(
        ConfigError,
        match="5 does not divide batch_size 16777212; set it to 1, 2, 3, 4, 6, 12, 23, 46",
    ):
        configs.load(file, [("train.batch_size", "16777212"), ("train.accumulation", "5")])
    assert time.monotonic() - began < 5


def test_a_path_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError,
        match=r"--config a{200}\.\.\. \(300 characters\): cannot be read \(File name too long\)",
    ):
        configs.load("a" * 300)
    (tmp_path / "nul.py").write_bytes(b"x = 1\0")
    with pytest.raises(ConfigError, match=r"nul\.py.*null byte"):
        configs.load(tmp_path / "nul.py")
