"""The JSON schema of a config: takes what the config takes, and refuses wrong values of single
options.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from jaxpeft import __main__ as package
from jaxpeft import config as configs
from jaxpeft.config.files import parse_config
from jaxpeft.config.json_schema import schema
from jaxpeft.config.reference import sections
from jaxpeft.config.schema import as_dict
from jaxpeft.methods import METHODS
from tests.conftest import ROOT

GOOD: dict[str, Any] = {"model": {"path": "a"}, "data": {"train": "b"}, "train": {"epochs": 1}}


@pytest.fixture(scope="module")
def validator() -> jsonschema.Draft202012Validator:
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def changed(section: str, **options: Any) -> dict[str, Any]:
    return {**GOOD, section: {**GOOD.get(section, {}), **options}}


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem
)
def test_every_recipe_is_valid(validator: jsonschema.Draft202012Validator, recipe: Path) -> None:
    validator.validate(as_dict(configs.load(recipe)))


@pytest.mark.parametrize(
    "name", [name for name in METHODS if name not in ("mixed", "trainable_tokens")]
)
def test_the_defaults_of_every_method_are_valid(
    validator: jsonschema.Draft202012Validator, name: str
) -> None:
    options = json.loads(json.dumps(METHODS[name]().as_dict()))
    validator.validate(changed("method", **options))
    wrong = changed("method", **options, nothing_like_it=1)
    assert not validator.is_valid(wrong)


@pytest.mark.parametrize(
    "values",
    [
        GOOD,
        {**GOOD, "$schema": "jaxpeft.schema.json"},
        changed("method", rank=4),
        changed("method", name="mixed", methods=[{"name": "lora"}, {"name": "prefix"}]),
        changed("model", vocab_size=None),
        changed("data", train=["a", "b"], columns={"text": "body"}),
        changed("optimizer", learning_rate=1),
        changed(
            "compare", candidates=[{"name": "a", "method": {"name": "ia3"}, "learning_rate": 1e-3}]
        ),
    ],
)
def test_what_the_config_takes_is_valid(
    validator: jsonschema.Draft202012Validator, values: dict[str, Any]
) -> None:
    validator.validate(values)


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("optimizer", "learning_rate", 0),
        ("optimizer", "learning_rate", "1e-4"),
        ("optimizer", "b1", 1),
        ("optimizer", "schedule", "linera"),
        ("train", "batch_size", 2.5),
        ("train", "batch_size", 0),
        ("train", "batch_size", True),
        ("train", "seed", 2**32),
        ("method", "rank", 0),
        ("method", "rank", 2**31),
        ("method", "targets", [1]),
        ("method", "rank_pattern", {"query": 0}),
        ("method", "name", "lorra"),
        ("model", "path", 1),
        ("model", "task", None),
        ("data", "weights", [0.5, -1]),
        ("data", "header", "yes"),
        ("log", "plot", 1),
        ("train", "epoch", 1),
    ],
)
def test_what_the_config_refuses_of_one_option_is_not_valid(
    validator: jsonschema.Draft202012Validator, section: str, option: str, value: Any
) -> None:
    values = changed(section, **{option: value})
    assert parse_config(values)[1]
    assert not validator.is_valid(values)


def test_every_option_is_described_with_its_default() -> None:
    made = schema()
    for one in sections():
        if one.name.startswith("method") or not one.name or "." in one.name:
            continue
        found = made["properties"][one.name]["properties"]
        assert list(found) == [option.name for option in one.options]
        for option in one.options:
            assert found[option.name]["description"] == option.doc
            assert repr(found[option.name]["default"]) == option.default


@pytest.mark.parametrize("name", ["train", "compare", "data", "plan"])
def test_commands_print_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main([name, "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
