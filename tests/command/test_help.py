"""`--help` of every command, and the page that is made of the same metadata."""

from __future__ import annotations

import dataclasses
import importlib
import tomllib

import pytest

import jaxpeft
from jaxpeft import __main__ as package
from jaxpeft.command.options_page import page
from jaxpeft.command.verbs import VERBS, command_line
from jaxpeft.config.schema import Config
from jaxpeft.core.options import hints_of
from jaxpeft.methods import METHODS
from tests.conftest import ROOT

CONFIGURED = ("train", "compare", "data", "plan")


def words(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("name", VERBS)
@pytest.mark.parametrize("asking", ["--help", "-h"])
def test_every_command_prints_its_arguments(
    name: str, asking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.main([name, asking]) == 0
    said = words(capsys.readouterr().out)
    found = command_line(name)
    assert said.startswith(words(str(found.__doc__)))
    for field in dataclasses.fields(found.ARGUMENTS):
        assert f"--{field.name.replace('_', '-')}: " in said
        assert field.metadata["doc"] in said


@pytest.mark.parametrize("name", CONFIGURED)
def test_help_prints_every_option_of_every_section(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.main([name, "--help"]) == 0
    said = words(capsys.readouterr().out)
    for section, hint in hints_of(Config).items():
        if dataclasses.is_dataclass(hint) and section != "method":
            assert f"config.{section}: " in said
            assert all(
                f"{one.name}: " in said and one.metadata["doc"] in said
                for one in dataclasses.fields(hint)
            )
    assert all(f" {method} " in said for method in METHODS)
    assert "weight_decay: float = 0.0, >= 0 decoupled weight decay" in said
    assert "schedule: 'linear' | 'cosine' | 'constant' | 'wsd' = 'linear' " in said


@pytest.mark.parametrize("method", METHODS)
def test_help_of_one_method_prints_its_options_alone(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.main(["train", "--help", f"method.{method}"]) == 0
    said = words(capsys.readouterr().out)
    own = {f.name: f.metadata["doc"] for f in dataclasses.fields(METHODS[method])}
    assert said.startswith(f"config.method.{method}: ")
    assert all(f"{name}: " in said and doc in said for name, doc in own.items())
    assert "batch_size" not in said
    if METHODS[method].paper:
        assert METHODS[method].paper in said


@pytest.mark.parametrize("asked", ["--help=data", "-h=config.data"])
def test_a_section_may_stand_behind_an_equals_sign(
    asked: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert package.main(["plan", asked]) == 0
    assert capsys.readouterr().out.startswith("config.data: The rows and their tokenization.")


def test_a_section_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main(["train", "--help", "method.lorra"]) == 2
    assert (
        "--help method.lorra: no such section; did you mean 'method.lora'"
        in capsys.readouterr().err
    )
    assert package.main(["export", "--help", "model"]) == 2
    assert "--help model: this command reads no config" in capsys.readouterr().err


def test_the_package_lists_its_commands_and_runs_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main([]) == 0
    said = capsys.readouterr().out
    assert package.main(["--help"]) == 0
    assert capsys.readouterr().out == said
    assert [line.split()[0] for line in said.splitlines()[2:-2]] == list(VERBS)
    assert all(f"python -m jaxpeft.{name} " in said for name in VERBS)
    assert package.main(["trian"]) == 2
    assert "'trian': no such command; did you mean 'train'" in capsys.readouterr().err
    assert package.main(["train", "--config=configs/quickstart.py", "--validate", "--name=x"]) == 0


def test_the_console_script_is_the_package_s_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (script,) = project["scripts"].items()
    module, _, function = script[1].partition(":")
    assert script[0] == "jaxpeft"
    assert getattr(importlib.import_module(module), function) is package.main


def test_the_page_of_options_is_what_the_code_says() -> None:
    written = (ROOT / "docs" / "options.md").read_text()
    assert written == page(), "run: python -m jaxpeft.command.options_page > docs/options.md"


def test_the_package_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert package.main(["--version"]) == 0
    assert capsys.readouterr().out == f"jaxpeft {jaxpeft.__version__}\n"
