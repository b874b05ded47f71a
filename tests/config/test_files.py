"""Config files and overrides: how text becomes a value, and what is refused across sections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxpeft import config as configs
from jaxpeft.config.schema import as_dict
from jaxpeft.errors import ConfigError

FILE = """
from jaxpeft.config import defaults

def get_config():
    config = defaults({method!r})
    config.model.path = "somewhere"
    config.model.task = "sequence_classification"
    config.data.train = "rows.jsonl"
    config.data.max_length = 32
    config.train.epochs = 1.0
    config.baselines = ("head",)
    return config
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(FILE.format(method="lora"))
    return path


@pytest.mark.parametrize(
    ("option", "text", "value"),
    [
        ("baselines", "", ()),
        ("baselines", "full", ("full",)),
        ("baselines", "head,full", ("head", "full")),
        ("baseline_learning_rates", "{'full': 1e-4}", {"full": 1e-4}),
        ("method.targets", "query,value", ("query", "value")),
        ("method.targets", "query, attention.output.dense", ("query", "attention.output.dense")),
        ("method.targets", r".*\.(query|value)", r".*\.(query|value)"),
        ("method.targets", "all-linear", "all-linear"),
        ("method.targets", "['query']", ("query",)),
        ("method.rank_pattern", "{'query': 4}", {"query": 4}),
        ("method.layers_to_transform", "0,1", (0, 1)),
        ("method.rslora", "True", True),
        ("optimizer.clip_norm", "None", None),
        ("optimizer.learning_rate", "3e-4", 3e-4),
        ("train.batch_size", "64", 64),
        ("data.lengths", "(16, 32)", (16, 32)),
        ("data.train", "8.jsonl", "8.jsonl"),
        ("data.train", "2024", "2024"),
        ("model.path", "true", "true"),
    ],
)
def test_text_becomes_what_the_option_is(file: Path, option: str, text: str, value: Any) -> None:
    config: Any = configs.load(file, [(option, text)])
    for key in option.split("."):
        config = getattr(config, key)
    assert config == value
    assert type(config) is type(value)


def test_a_config_is_plain_values_and_back(file: Path) -> None:
    config = configs.load(file, [("method.rank_pattern", "{'query': 4}"), ("baselines", "full")])
    assert configs.load(file) != config
    again, problems = configs.files.parse_config(as_dict(config))
    assert (again, problems) == (config, [])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        ([("baseline_learning_rates", "{'lora': 1e-4}")], "baseline_learning_rates: 'lora' is not one of"),
        ([("baseline_learning_rates", "{'full': -1}")], "baseline_learning_rates"),
        ([("baselines", "lora")], "config.baselines"),
        ([("model.task", "causal_lm"), ("baselines", "")], None),
        ([("model.task", "causal_lm")], "'head' trains a classification head, task is 'causal_lm'"),
        ([("train.batch_size", "10"), ("train.accumulation", "4")], "4 does not divide batch_size 10; it could be 1, 2, 5"),
        ([("train.epochs", "None")], "neither epochs nor steps is set"),
        ([("method.rank", "[8]")], "config.method.rank: must be an integer"),
        ([("method", "lora")], "config.method"),
        ([("metod.rank", "8")], "--config.metod.rank: no such option; did you mean"),
    ],
)  # fmt: skip
def test_what_is_refused(file: Path, overrides: list[tuple[str, str]], text: str | None) -> None:
    if text is None:
        configs.load(file, overrides)
        return
    with pytest.raises(ConfigError) as caught:
        configs.load(file, overrides)
    assert text in str(caught.value)


def test_a_method_that_does_not_exist_is_named_in_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE.format(method="lorra"))
    with pytest.raises(ConfigError, match=r"mine\.py:5: .*'lorra' is not a method; did you mean 'lora'"):
        configs.load(tmp_path / "mine.py")


def test_another_method_drops_the_options_of_the_first_whatever_the_order(file: Path) -> None:
    config = configs.load(file, [("method.modules_to_save", "pooler"), ("method.name", "bitfit")])
    assert (config.method.name, config.method.modules_to_save) == ("bitfit", ("pooler",))
