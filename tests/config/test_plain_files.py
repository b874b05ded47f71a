"""YAML and JSON configs: the same config as a Python file's, numbers as numbers, nothing named
twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxpeft import config as configs
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.errors import ConfigError
from tests.conftest import ROOT

PYTHON = """
from jaxpeft.config import defaults

def get_config():
    config = defaults("dora")
    config.model.path = "somewhere"
    config.method.rank = 4
    config.data.train = ("a.jsonl", "b.jsonl")
    config.data.weights = (1, 3e-1)
    config.data.separator = "\\n"
    config.optimizer.learning_rate = 1e-4
    config.train.epochs = 2
    return config
"""
YAML = r"""
# yaml-language-server: $schema=jaxpeft.schema.json
model: {path: somewhere}
method:
  name: dora
  rank: 4
data:
  train: [a.jsonl, b.jsonl]
  weights: [1, 3e-1]
  separator: "\n"
optimizer:
  learning_rate: 1e-4
train: {epochs: 2}
"""
JSON = """
{"$schema": "jaxpeft.schema.json", "model": {"path": "somewhere"}, "method": {"name": "dora", "rank": 4},
 "data": {"train": ["a.jsonl", "b.jsonl"], "weights": [1, 3e-1], "separator": "\\n"},
 "optimizer": {"learning_rate": 1e-4}, "train": {"epochs": 2}}
"""


def written(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize(("name", "text"), [("a.yaml", YAML), ("a.yml", YAML), ("a.json", JSON)])
def test_the_same_options_are_the_same_config(tmp_path: Path, name: str, text: str) -> None:
    ours = configs.load(written(tmp_path, "a.py", PYTHON))
    assert configs.load(written(tmp_path, name, text)) == ours
    overrides = [
        ("method.rank", "2"),
        ("optimizer.learning_rate", "3e-3"),
        ("train.batch_size", "8"),
    ]
    assert configs.load(tmp_path / name, overrides) == configs.load(tmp_path / "a.py", overrides)
    other = configs.load(tmp_path / name, [("method.name", "ia3")])
    assert other.method.name == "ia3"


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_every_recipe_can_be_written_as_yaml_and_json(tmp_path: Path, recipe: Path) -> None:
    yaml = pytest.importorskip("yaml")
    config = configs.load(recipe)
    plain = as_dict(config)
    assert configs.load(written(tmp_path, "a.json", json.dumps(plain))) == config
    assert configs.load(written(tmp_path, "a.yaml", yaml.safe_dump(plain))) == config


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.e-4", "0.1e-3", "+1e-4", ".0001"])
def test_numbers_are_numbers(tmp_path: Path, text: str) -> None:
    file = written(tmp_path, "a.yaml", YAML.replace("1e-4", text))
    assert configs.load(file).optimizer.learning_rate == 1e-4


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.yaml",
            "model: {path: a}\nmodel: {path: b}\n",
            "a.yaml:2:1: sets 'model' twice; remove one of them",
        ),
        (
            "a.yaml",
            "model:\n  path: a\n  dtype: auto\n  path: b\n",
            "a.yaml:4:3: sets 'path' twice",
        ),
        ("a.json", '{"model": {"path": "a", "path": "b"}}', "a.json: has the key 'path' twice"),
        ("a.yaml", "model: [1\n", "a.yaml:2:1: expected ',' or ']'"),
        ("a.json", '{"model": \n 1,}', "a.json:2:4: not JSON"),
        (
            "a.yaml",
            "model: !!python/object:os.system {}\n",
            "a.yaml:1:8: could not determine a constructor",
        ),
        ("a.yaml", "a: 1\n---\nb: 2\n", "a.yaml:2:1: but found another document"),
        (
            "a.yaml",
            "- 1\n",
            "a.yaml: must contain sections such as model and train, contains a list",
        ),
        ("a.json", "[1]", "a.json: must contain a JSON object, contains a list"),
        ("a.yaml", "[" * 3000, "a.yaml: not a config (maximum recursion depth exceeded"),
        ("a.json", "[" * 30000, "a.json: nested too deeply to be a config"),
        (
            "a.yaml",
            "train: {epochs: yes}\n",
            "config.train.epochs: must be a number or None, is 'yes' (str)",
        ),
        (
            "a.yaml",
            'optimizer: {eps: "1e-4"}\n',
            "is '1e-4' (str); write the number without quotes",
        ),
        ("a.yaml", 'train: {epochs: "1e-4"}\n', "must be a number or None, is '1e-4' (str)"),
        (
            "a.yaml",
            "model: {path: 12}\n",
            "config.model.path: must be a string, is 12 (int); write it in quotes",
        ),
        ("a.yaml", "data: {revision: 2024-01-31}\n", "datetime.date(2024, 1, 31) (date)"),
        (
            "a.yaml",
            "optimizer: {learning_rate: .inf}\n",
            "config.optimizer.learning_rate: must be a finite number",
        ),
        (
            "a.yaml",
            "method: {name: lorra}\n",
            "config.method.name: 'lorra' is not a method; did you mean 'lora'",
        ),
        ("a.yaml", "method: lora\n", "config.method: must be a section with options, is 'lora'"),
        ("a.yaml", "train: 3\n", "config.train: must be a section with options, is 3 (int)"),
        ("a.yaml", "trian: {epochs: 1}\n", "config.trian: no such option; did you mean 'train'"),
        (
            "a.yaml",
            "train: {epoch: 1}\n",
            "config.train.epoch: no such option; did you mean 'epochs'",
        ),
        ("a.toml", "x = 1\n", "must be a file NAME.py, NAME.yaml or NAME.json"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_place(
    tmp_path: Path, name: str, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        configs.load(written(tmp_path, name, text))
    assert said in str(refused.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"model: {path: caf\xe9}\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not UTF-8 text at byte 17; save it as UTF-8"):
        configs.load(tmp_path / "a.yaml")


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    overrides = [("model.path", "a"), ("data.train", "b"), ("train.epochs", "1")]
    config = configs.load(written(tmp_path, "a.yaml", "# nothing yet\n"), overrides)
    assert config.optimizer == Config().optimizer


def test_a_name_near_the_one_that_is_missing_is_offered(tmp_path: Path) -> None:
    written(tmp_path, "sweep.yaml", YAML)
    with pytest.raises(ConfigError, match=r"no such file; did you mean .*sweep\.yaml"):
        configs.load(tmp_path / "swep.yaml")
    with pytest.raises(ConfigError, match=r"a folder; give one of its files: sweep\.yaml"):
        configs.load(tmp_path)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("mixed", {"methods": [{"name": "lora", "rank": 4}, {"name": "bitfit"}]}),
        ("trainable_tokens", {"tokens": [5, 6]}),
    ],
)
@pytest.mark.parametrize("name", ["a.yaml", "a.json", "a.py"])
def test_a_method_with_an_option_that_must_be_set(
    tmp_path: Path, name: str, method: str, options: dict[str, Any]
) -> None:
    values = {
        "model": {"path": "m"},
        "data": {"train": "t"},
        "train": {"steps": 1},
        "method": {"name": method, **options},
    }
    text = json.dumps(values)
    if name == "a.py":
        text = (
            "from jaxpeft.config import defaults\ndef get_config():\n"
            f"    config = defaults({method!r})\n    config.update({values!r})\n    return config\n"
        )
    made = configs.load(written(tmp_path, name, text)).method.as_dict()
    key, value = next(iter(options.items()))
    if method == "mixed":
        assert [part["name"] for part in made["methods"]] == ["lora", "bitfit"]
        assert made["methods"][0]["rank"] == 4
    else:
        assert list(made[key]) == value
    empty = written(tmp_path, "b.json", json.dumps({**values, "method": {"name": method}}))
    with pytest.raises(ConfigError, match=f"config.method.{key}: "):
        configs.load(empty)
