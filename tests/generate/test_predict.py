"""Labels predicted by the command: those of `jaxpeft.apply` and of the run's settings."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.data.pipeline import load_tokenizer
from jaxpeft.generate import __main__ as command
from jaxpeft.hub.adapters.settings import Settings
from tests.conformance.conftest import moved

TEXTS = ["word1 word2 word3", "word4", "word5 word6 word7 word8"]
NAMES = ("red", "green", "blue")
Make = Callable[..., tuple[Path, Callable[..., Any]]]


@pytest.fixture
def make(tiny_models: Mapping[str, Path], tmp_path: Path) -> Make:
    """Save an adapter of a tiny BERT; return its folder and a function that gives its logits."""

    def save(task: Any, count: int, **settings: Any) -> tuple[Path, Callable[..., Any]]:
        model, base = jaxpeft.load(tiny_models["bert"], task=task, num_labels=count)
        method = jaxpeft.LoRA(rank=2, targets=("query",))
        params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
        tokenizer = load_tokenizer(model.source)
        jaxpeft.save_adapter(
            tmp_path / "adapter", method, params, model, settings=Settings(**settings),
            tokenizer=tokenizer,
        )  # fmt: skip

        def logits(*texts: Any, **options: Any) -> Any:
            given = tokenizer(*texts, return_tensors="np", **options)
            ids = given["input_ids"], given["attention_mask"]
            return np.asarray(jaxpeft.apply(model, params, *ids))[0]

        return tmp_path / "adapter", logits

    return save


def predict(adapter: Path, source: Path, capsys: Any, *options: str) -> list[dict[str, Any]]:
    assert command.main(["--adapter", str(adapter), "--input", str(source), *options]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def write_csv(path: Path, **columns: list[Any]) -> Path:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
    return path


@pytest.mark.slow
def test_a_classifier_gives_labels_with_probabilities(
    make: Make, tmp_path: Path, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    adapter, logits = make(
        "sequence_classification", 3, labels=NAMES, problem_type="single_label_classification"
    )
    source = write_csv(tmp_path / "in.csv", id=[1, 2, 3], text=TEXTS)
    with caplog.at_level("INFO", logger="jaxpeft"):
        caplog.clear()
        found = predict(adapter, source, capsys)
    assert "newly initialized" not in caplog.text and "loaded lora adapter" in caplog.text
    assert [row["text"] for row in found] == TEXTS
    for row, text in zip(found, TEXTS, strict=True):
        wanted = np.asarray(jax.nn.softmax(logits(text)))
        np.testing.assert_allclose([row["probabilities"][n] for n in NAMES], wanted, atol=1e-5)
        assert row["prediction"] == NAMES[int(wanted.argmax())]
    out = tmp_path / "deep" / "out.jsonl"
    assert predict(adapter, source, capsys, "--output", str(out), "--batch-size=1") == []
    again = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prediction"] for row in again] == [row["prediction"] for row in found]


def test_labels_do_not_control_the_terminal(make: Make, tmp_path: Path, capsys: Any) -> None:
    names = tuple(f"{name}\x9b31m" for name in NAMES)
    adapter, _ = make("sequence_classification", 3, labels=names)
    source = write_csv(tmp_path / "in.csv", text=TEXTS)
    assert command.main(["--adapter", str(adapter), "--input", str(source)]) == 0
    shown = capsys.readouterr().out
    assert "\x9b" not in shown
    assert {json.loads(line)["prediction"] for line in shown.splitlines()} <= {*names}


def test_generated_text_does_not_control_the_terminal(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    command._write("\x1b[2Jtext\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    command._write("\x1b[2Jtext\n")
    assert capsys.readouterr().out == "\x1b[2Jtext\n\\u001b[2Jtext\n"


@pytest.mark.slow
def test_pairs_with_several_labels(make: Make, tmp_path: Path, capsys: Any) -> None:
    adapter, logits = make(
        "sequence_classification", 3, labels=NAMES, problem_type="multi_label_classification"
    )
    source = write_csv(tmp_path / "in.csv", sentence1=TEXTS, sentence2=TEXTS[::-1])
    for row, pair in zip(
        predict(adapter, source, capsys), zip(TEXTS, TEXTS[::-1], strict=True), strict=True
    ):
        wanted = np.asarray(jax.nn.sigmoid(logits(*pair)))
        np.testing.assert_allclose([row["probabilities"][n] for n in NAMES], wanted, atol=1e-5)
        assert row["prediction"] == [n for n, p in zip(NAMES, wanted, strict=True) if p > 0.5]


@pytest.mark.slow
def test_a_regression_gives_numbers(make: Make, tmp_path: Path, capsys: Any) -> None:
    adapter, logits = make("sequence_classification", 1, problem_type="regression")
    source = write_csv(tmp_path / "in.csv", text=TEXTS)
    found = [row["prediction"] for row in predict(adapter, source, capsys)]
    np.testing.assert_allclose(found, [logits(text)[0] for text in TEXTS], atol=1e-5)


def test_every_word_gets_a_label_and_words_beyond_the_length_none(
    make: Make, tmp_path: Path, capsys: Any
) -> None:
    adapter, logits = make("token_classification", 3, labels=NAMES, data={"max_length": 5})
    source = tmp_path / "in.jsonl"
    words = [text.split() for text in TEXTS]
    source.write_text("".join(json.dumps({"tokens": each}) + "\n" for each in words))
    for row, each in zip(predict(adapter, source, capsys), words, strict=True):
        wanted = logits(each[:3], is_split_into_words=True)[1:-1].argmax(-1)
        assert row["prediction"] == [NAMES[i] for i in wanted] + [None] * (len(each) - 3)
        assert row["tokens"] == each
        assert all(p is None or abs(sum(p.values()) - 1) < 1e-6 for p in row["probabilities"])


def test_rows_without_a_text_and_language_models_are_told(
    make: Make, llama: str, tmp_path: Path, capsys: Any
) -> None:
    adapter, _ = make("sequence_classification", 3, labels=NAMES)
    source = write_csv(tmp_path / "in.csv", a=["x"], b=["y"])
    assert command.main(["--adapter", str(adapter), "--input", str(source)]) == 2
    assert "Columns present: a, b" in capsys.readouterr().err
    assert command.main(["--model", llama, "--input", str(source)]) == 2
    assert "--input: needs a classifier, but the task is causal_lm" in capsys.readouterr().err
