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
        ("compare.seeds", "", ()),
        ("compare.seeds", "3", (3,)),
        ("compare.seeds", "3,4", (3, 4)),
        ("method.alpha_pattern", "{'query': 1e-4}", {"query": 1e-4}),
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
        ("data.lengths", "32", (32,)),
        ("method.rank_pattern.query", "4", 4),
        ("method.rank_pattern.layer.0.attention.self.query", "4", 4),
        ("method.alpha_pattern.query", "1e-5", 1e-5),
        ("data.columns.text", "body", "body"),
        ("data.columns.text", "1", "1"),
        ("data.header", "false", False),
        ("data.quoting", "none", "none"),
        ("data.delimiter", r"\t", "\t"),
        ("data.delimiter", ",", ","),
        ("checkpoint.every_steps", "None", None),
    ],
)
def test_text_becomes_what_the_option_is(file: Path, option: str, text: str, value: Any) -> None:
    config: Any = configs.load(file, [(option, text)])
    path = option.split(".")
    while path:
        if isinstance(config, dict):
            config, path = config[".".join(path)], []
        else:
            config, path = getattr(config, path[0]), path[1:]
    assert config == value
    assert type(config) is type(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\nA: ", "\nA: "),
        (r"'\nA: '", "\nA: "),
        ("\nA: ", "\nA: "),
        (r"\\n\t\x", "\\n\t\\x"),
        (" -> ", " -> "),
    ],
)
def test_a_separator_is_read_as_in_python_since_a_shell_does_not(
    file: Path, text: str, value: str
) -> None:
    overrides = [("model.task", "causal_lm"), ("data.separator", text)]
    assert configs.load(file, overrides).data.separator == value


def test_a_config_is_plain_values_and_back(file: Path) -> None:
    config = configs.load(file, [("method.rank_pattern", "{'query': 4}"), ("compare.seeds", "7")])
    assert configs.load(file) != config
    again, problems = configs.files.parse_config(as_dict(config))
    assert (again, problems) == (config, [])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (
            [("method.alpha_pattern", "{'full': -1}")],
            "method.alpha_pattern: must be above 0, is -1",
        ),
        (
            [("baselines", "head")],
            (
                "config.baselines: is removed: a run trains one method; list the methods instead,"
                " as in config.compare.candidates = ("
            ),
        ),
        (
            [("baselines", "head")],
            (
                "({'method': {'name': 'head'}}, {}), where {} is config.method, and run `python -m"
                " jaxpeft.compare`"
            ),
        ),
        (
            [("baseline_learning_rates", "{'full': 1e-4}")],
            (
                "config.baseline_learning_rates: is removed; set the learning_rate of each of"
                " config.compare.candidates"
            ),
        ),
        ([("model.task", "causal_lm")], None),
        (
            [("model.task", "causal_lm"), ("method.name", "head")],
            "'head' trains only a classification head, but the task is 'causal_lm'",
        ),
        (
            [("train.batch_size", "10"), ("train.accumulation", "4")],
            "4 does not divide batch_size 10; set it to 1, 2, 5",
        ),
        ([("train.epochs", "None")], "neither epochs nor steps is set"),
        ([("method.rank", "[8]")], "config.method.rank: must be an integer"),
        ([("method", "lora")], "--config.method: is a section; set --config.method.name=NAME"),
        ([("method", "bitfit"), ("method.rank", "4")], "--config.method: is a section"),
        (
            [("train", "3")],
            (
                "--config.train: is a section; set one of its options: accumulation, batch_size,"
                " compiled, epochs"
            ),
        ),
        (
            [("evaluation.metric", "acuracy")],
            "evaluation.metric: must be one of 'loss', 'perplexity', 'accuracy'",
        ),
        (
            [("model.task", "causal_lm"), ("optimizer.head_learning_rate", "1e-3")],
            "head_learning_rate: a language model has no new head",
        ),
        (
            [("model.task", "causal_lm"), ("data.problem", "regression")],
            "data.problem: is only for task 'sequence_classification'",
        ),
        (
            [("train.epochs", "None"), ("train.steps", "10"), ("optimizer.warmup_steps", "100")],
            "100 warm-up steps must be fewer than the run's 10 steps",
        ),
        ([("data.packing", "true")], "data.packing: is only for task 'causal_lm'"),
        ([("data.columns", "{'txt': 'a'}")], "columns: 'txt' is not a field; did you mean 'text'"),
        (
            [("data.delimiter", "tab")],
            "data.delimiter: must be one character, or 'auto', is 'tab'; a tab is '\\t'",
        ),
        (
            [("data.encoding", "latin-x")],
            "data.encoding: 'latin-x' is not an encoding that Python knows, such as 'utf-8'",
        ),
        (
            [("data.encoding", "a" * 10**6)],
            f"data.encoding: '{'a' * 79}... (1,000,002 characters) is not an encoding",
        ),
        (
            [("data.delimiter", "a" * 10**6)],
            f"one character, or 'auto', is '{'a' * 79}... (1,000,002 characters); a tab",
        ),
        (
            [("data.encoding", "base64")],
            "data.encoding: 'base64' is not an encoding that Python knows",
        ),
        (
            [
                ("data.streaming", "true"),
                ("data.validation", "x.csv"),
                ("checkpoint.every_steps", "None"),
                ("train.epochs", "None"),
                ("train.steps", "9"),
            ],
            "checkpoint.every_steps: is None (every epoch), but the length of a stream",
        ),
        ([("metod.rank", "8")], "--config.metod.rank: no such option; did you mean"),
    ],
)
def test_what_is_refused(file: Path, overrides: list[tuple[str, str]], text: str | None) -> None:
    if text is None:
        configs.load(file, overrides)
        return
    with pytest.raises(ConfigError) as caught:
        configs.load(file, overrides)
    assert text in str(caught.value)


def test_a_method_that_does_not_exist_is_named_in_the_file_too(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(FILE.format(method="lorra"))
    with pytest.raises(
        ConfigError, match=r"mine\.py:5: .*'lorra' is not a method; did you mean 'lora'"
    ):
        configs.load(tmp_path / "mine.py")


def test_another_method_drops_the_options_of_the_first_whatever_the_order(file: Path) -> None:
    config = configs.load(file, [("method.modules_to_save", "pooler"), ("method.name", "bitfit")])
    assert (config.method.name, config.method.modules_to_save) == ("bitfit", ("pooler",))


def test_what_is_wrong_in_a_section_and_across_it_is_told_at_once(file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configs.load(
            file,
            [
                ("train.steps", "5"),
                ("train.batch_size", "0"),
                ("method.rank", "0"),
                ("method.layers_pattern", "layers"),
            ],
        )
    text = str(caught.value)
    for part in (
        "batch_size: must be at least 1",
        "steps: 5 and epochs 1.0 cannot both be set",
        "rank: must be at least 1",
        "layers_pattern: needs layers_to_transform",
    ):
        assert part in text
    assert len(caught.value.problems) == 4


def test_every_wrong_line_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    lines = (
        "    config.train.steps = '5'\n",
        "    config.optimizer.learning_rate = '1e-4'\n",
        "    config.train.stepps = 4\n",
    )
    body = FILE.format(method="lora").replace(
        "    return config", "".join(lines) + "    return config"
    )
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(ConfigError) as caught:
        configs.load(tmp_path / "mine.py")
    text = str(caught.value)
    for part in (
        "config.train.steps: must be an integer or None, is '5'",
        "learning_rate: must be a number, is '1e-4'",
        "config.train.stepps: no such option; did you mean 'steps'",
    ):
        assert part in text


@pytest.mark.parametrize(
    "line",
    [
        "1 / 0",
        "raise RuntimeError('no')",
        "open('/nowhere')",
        "import sys; sys.exit(7)",
        "assert False",
    ],
)
def test_a_file_that_fails_is_named_with_the_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.py").write_text(f"\n{line}\n")
    with pytest.raises(ConfigError, match=r"mine\.py:2: "):
        configs.load(tmp_path / "mine.py")


def test_a_file_without_a_method_takes_the_default(tmp_path: Path) -> None:
    body = (
        "def get_config():\n    return {'model': {'path': 'x'}, 'data': {'train': 'x'}, 'train':"
        " {'steps': 3}}\n"
    )
    (tmp_path / "mine.py").write_text(body)
    config: Any = configs.load(tmp_path / "mine.py", [("method.rank", "3")])
    assert (config.method.name, config.method.rank) == ("lora", 3)


def test_a_folder_in_place_of_a_file_is_told_with_its_files(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"a folder; give one of its files: mine\.py"):
        configs.load(file.parent)


def test_a_python_file_without_get_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.py"
    path.write_text("config = {}\n")
    with pytest.raises(
        ConfigError, match=r"config.py: defines no get_config\(\); return the config"
    ):
        configs.load(path)
