"""`python -m jaxpeft.data`: the rows as the model sees them, and the figures of the data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxpeft.data import report
from jaxpeft.data.__main__ import main
from jaxpeft.data.chat.dialogs import Completion, Preference
from jaxpeft.train.__main__ import main as train
from tests.train.runs import tiny_models

__all__ = ["tiny_models"]
CONFIG = """
from jaxpeft.config import defaults

def get_config():
    config = defaults()
    config.model.path = {model!r}
    config.data.train = {rows!r}
    config.data.max_length = 16
    config.data.validation_share = 0.5
    config.train.steps = 3
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path, tiny_models: Mapping[str, Path]) -> Path:
    (tmp_path / "rows.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"word{i} word2", "completion": " word3 word4"}) + "\n"
            for i in range(8)
        )
    )
    file = tmp_path / "mine.py"
    file.write_text(
        CONFIG.format(model=str(tiny_models["llama"]), rows=str(tmp_path / "rows.jsonl"))
    )
    return file


def table(shown: str) -> dict[str, list[str]]:
    """Return the cells of each row of the printed table."""
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in shown.splitlines()
        if line.startswith("│")
    ]
    return {name: values for name, *values in cells}


def test_learned_text_is_set_off_and_the_figures_are_those_of_the_rows(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file), "--show", "2"]) == 0
    shown = capsys.readouterr().out
    assert "--- row 1: 6 tokens, 3 learned" in shown
    assert shown.count("⟦word3 word4 [SEP]⟧") == shown.count("--- row") == 2
    figures = table(shown)
    assert figures["rows"] == ["4", "4"]
    assert figures["tokens"] == ["24", "24"]
    assert figures["tokens in the loss"] == ["12", "12"]
    assert figures["length, median"] == ["6", "6"]
    assert figures["steps per epoch"] == ["1", ""]


def test_packed_documents_are_parted_and_the_fill_is_told(
    config_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(config_file), "--config.data.packing=true", "--show=9"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- row") == 2
    assert shown.count("- - -\n") == 2
    assert table(shown)["packed rows"] == ["2", "2"]
    assert table(shown)["positions filled"] == [f"{24 / 32:.1%}"] * 2
    assert table(shown)["length, longest"] == ["6", "6"]


def test_how_files_were_read_and_columns_were_taken_is_told(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = "nr;question;answer\n" + "".join(f"{i};word{i};word2\n" for i in range(8))
    (tmp_path / "rows.csv").write_bytes(table.encode("utf-16"))
    assert (
        main(["--config", str(config_file), "--show=0", f"--config.data.train={tmp_path}/rows.csv"])
        == 0
    )
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert (
        first == f"{tmp_path}/rows.csv: delimiter ';', fields may be quoted, the first line is the"
        " header, encoding utf-16"
    )
    assert second == "columns: prompt is 'question'; completion is 'answer'; unused: 'nr'"


@pytest.mark.usefixtures("minilm")
def test_labels_are_counted_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).parents[2]
    assert main(["--config", str(root / "configs" / "quickstart.py"), "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert ", label " in shown
    assert "[CLS] " in shown
    counts = [int(values[0]) for name, values in table(shown).items() if name.startswith("label ")]
    assert np.sum(counts) == int(table(shown)["rows"][0].replace(",", ""))


@pytest.mark.parametrize("chat", [False, True])
def test_preference_pairs_are_shown_and_not_trained_on(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], chat: bool
) -> None:
    answers = [{"chosen": "word1", "rejected": "word2"} for _ in range(6)]
    if chat:
        answers = [
            {k: [{"role": "assistant", "content": v}] for k, v in answer.items()}
            for answer in answers
        ]
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": "word0 ?"} | a) + "\n" for a in answers)
    )
    assert main(["--config", str(config_file), "--show=1"]) == 0
    shown = capsys.readouterr().out
    assert "--- pair 1" in shown
    assert (
        "user: word0 ?\nchosen: assistant: word1" if chat else "word0 ?\nchosen: word1"
    ) in shown
    assert "rows.jsonl: 3 valid preference pairs, but no method trains on pairs yet" in shown
    assert train(["--config", str(config_file), "--workdir", str(tmp_path / "run")]) == 2
    assert (
        "3 valid preference pairs, but no method trains on pairs yet; use rows"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "--config: is not given"),
        (["--config", "nowhere.py"], "no such file"),
        (
            ["--config", "configs/quickstart.py", "--shw=2"],
            "--shw: no such option; did you mean '--show'",
        ),
        (
            ["--config", "configs/quickstart.py", "--config.data.train=nowhere.jsonl"],
            "nowhere.jsonl: no such file",
        ),
    ],
)
def test_bad_input_is_told_in_a_line(
    arguments: list[str],
    text: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert main(arguments) == 2
    assert text in capsys.readouterr().err


def test_help_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "python -m jaxpeft.data --config configs/NAME.py" in shown
    assert "--show: int = 3, >= 0\n      rows to show" in shown


def test_a_row_does_not_control_the_terminal() -> None:
    pair = Preference(Completion("", "red\x1b[31m"), Completion("", "green"))
    examples: Any = SimpleNamespace(texts=[pair])
    shown = [part.plain for part in report.pairs(examples, 1)]
    assert shown == ["--- pair 1", "", "chosen: red\\u001b[31m", "rejected: green"]
