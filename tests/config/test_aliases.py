"""`target_modules` and `exclude_modules`, PEFT's names, wherever there are `targets` and `exclude`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jaxpeft
from jaxpeft import config as configs
from jaxpeft.core.options import parse
from jaxpeft.errors import ConfigError
from jaxpeft.quant.quantize import Quant

PYTHON = """
from jaxpeft.config import defaults
def get_config():
    config = defaults({method!r})
    config.model.path, config.data.train, config.train.steps = "a", "b", 1
    {lines}
    return config
"""
TARGETED = [name for name, cls in jaxpeft.METHODS.items() if hasattr(cls, "targets")]
OTHERS = [name for name in jaxpeft.METHODS if name not in [*TARGETED, "mixed"]]


def written(folder: Path, lines: str = "pass", method: str = "lora") -> Path:
    path = folder / "config.py"
    path.write_text(PYTHON.format(lines=lines, method=method))
    return path


def refusal(make: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as refused:
        make()
    return str(refused.value)


@pytest.mark.parametrize("name", TARGETED)
def test_every_method_with_targets_takes_them_in_python_and_from_plain_values(name: str) -> None:
    cls: Any = jaxpeft.METHODS[name]
    options: Any = {"layers_to_transform": (0,)} if name == "freeze" else {}
    options |= {"tokens": (1,)} if name == "trainable_tokens" else {}
    wanted = cls(targets=("a", "b"), exclude=("c",), **options)
    made = cls(target_modules=["a", "b"], exclude_modules=["c"], **options)
    assert made == wanted
    assert dataclasses.replace(made, exclude=()).targets == ("a", "b")
    assert made.as_dict() == wanted.as_dict()
    values = {"target_modules": ["a", "b"], "exclude_modules": "c", **options}
    read, problems = parse(cls, values, "method")
    assert problems == [] and read.targets == ("a", "b") and read.exclude == "c"


def test_a_quantized_base_takes_them() -> None:
    assert Quant("nf4", target_modules=["a"]) == Quant("nf4", ("a",))
    assert Quant("nf4", exclude_modules="a.*").exclude == "a.*"


@pytest.mark.parametrize(
    ("lines", "overrides", "wanted"),
    [
        ("config.method.target_modules = ('a',)", [], ("a",)),
        ("config.method.target_modules = 'a.*'", [], "a.*"),
        ("config.method.target_modules = ('a',)", [("method.targets", "b")], ("b",)),
        ("config.method.targets = ('a',)", [("method.target_modules", "b,c")], ("b", "c")),
        ("pass", [("method.target_modules", "all-linear")], "all-linear"),
        ("config.method.target_modules = config.method.targets = ('a',)", [], ("a",)),
    ],
)
def test_a_config_and_the_command_line_take_them(
    lines: str, overrides: list[tuple[str, str]], wanted: Any, tmp_path: Path
) -> None:
    method: Any = configs.load(written(tmp_path, lines), overrides).method
    found = (method.targets,) if isinstance(method.targets, str) else method.targets
    assert found == ((wanted,) if isinstance(wanted, str) else wanted)


def test_an_option_by_both_names_is_refused(tmp_path: Path) -> None:
    lines = "config.method.target_modules, config.method.targets = ('a',), ('b',)"
    said = "config.method.target_modules: is an alias of targets, which is ('b',); set only one of them"
    assert refusal(lambda: configs.load(written(tmp_path, lines))) == said
    said = "LoRA.exclude_modules: is an alias of exclude, which is ('b',); set only one of them"
    assert refusal(lambda: jaxpeft.LoRA(exclude=("b",), exclude_modules=("a",))) == said


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_without_targets_has_no_target_modules(name: str, tmp_path: Path) -> None:
    path = written(tmp_path, "config.method.target_modules = ('a',)", name)
    assert "config.method.target_modules: no such option" in refusal(lambda: configs.load(path))
