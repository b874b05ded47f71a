"""What a run decided goes with its adapter, and what it prints at its end predicts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

import jaxpeft
from jaxpeft.config.schema import Config
from jaxpeft.train.records import read_lines
from tests.train.runs import LABELS, SPECIAL, WORDS, Finished, finish, short_config

MakeConfig = Callable[..., Config]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": WORDS[i]},
            {"role": "assistant", "content": WORDS[i + 1]},
        ]
    }
    for i in range(20)
]
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "chat": (CHATS, {"data__chat_template": "chatml"}),
    "instruction": ([{"instruction": WORDS[i], "output": WORDS[i + 1]} for i in range(20)], {}),
    "completion": (
        [{"prompt": WORDS[i], "completion": WORDS[i + 1]} for i in range(20)],
        {"data__separator": " word9 "},
    ),
    "tags": (
        [{"tokens": WORDS[i : i + 2], "tags": ["O", "X"]} for i in range(20)],
        {"model__task": "token_classification"},
    ),
    "many": (
        [{"text": WORDS[i], "labels": sorted({LABELS[i % 3], LABELS[0]})} for i in range(20)],
        {"model__task": "sequence_classification"},
    ),
}


@pytest.fixture(scope="module")
def chat(tiny_models: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run on chats."""
    folder = tmp_path_factory.mktemp("chat")
    rows, options = ROWS["chat"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = options | {"data__train": str(folder / "rows.jsonl"), "train__steps": 3}
    return finish(short_config(tiny_models, folder, "text", **options), folder / "run")


SHARED = {"single": "finished", "chat": "chat"}
"""Kinds of data that other tests, too, read a run of: its fixture."""


def end_of(run: Finished) -> str:
    """Return the Python that a run printed last."""
    (told,) = (one for one in run.messages if one.startswith("next, use the adapter:\n"))
    return "\n".join(line[2:] for line in told.splitlines()[1:])


@pytest.mark.parametrize("kind", ["single", "pair", "regression", "text", *ROWS])
@pytest.mark.representatives("chat")
def test_what_is_printed_at_the_end_predicts(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    shared = SHARED.get(kind)
    run: Finished = request.getfixturevalue(shared) if shared else made(request, kind)
    capsys.readouterr()
    exec(end_of(run), {})
    printed = capsys.readouterr().out.removesuffix("\n")
    found = jaxpeft.read_settings(run.folder / "adapter")
    if kind in ("single", "pair"):
        assert (
            found.labels == tuple(sorted(LABELS))
            and json.loads(printed.replace("'", '"'))[0] in LABELS
        )
        assert found.problem_type == "single_label_classification"
    elif kind == "regression":
        assert found.problem_type == "regression" and isinstance(json.loads(printed)[0], float)
    elif kind == "tags":
        assert set(json.loads(printed.replace("'", '"'))[0]) <= {"O", "X"}
    elif kind == "many":
        assert found.problem_type == "multi_label_classification"
        assert set(json.loads(printed.replace("'", '"'))[0]) <= set(LABELS)
    else:  # an answer may end at once
        assert found.problem_type is None and set(printed.split()) <= {*WORDS, *SPECIAL}
    assert found.separator == (" word9 " if kind == "completion" else None)


def made(request: pytest.FixtureRequest, kind: str) -> Finished:
    """Train on a kind of data."""
    make_config: MakeConfig = request.getfixturevalue("make_config")
    tmp_path: Path = request.getfixturevalue("tmp_path")
    options: dict[str, Any] = {"train__steps": 3} | (
        {"data__problem": kind} if kind == "regression" else {}
    )
    if kind in ROWS:
        rows, more = ROWS[kind]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options |= more | {"data__train": str(tmp_path / "rows.jsonl")}
        if "model__task" in more:
            options["model__path"] = str(request.getfixturevalue("tiny_models")["bert"])
    plain = kind in ("single", "pair", "regression") or "model__task" in options
    config = make_config(
        kind if kind in ("single", "pair", "regression", "text") else "single" if plain else "text",
        **options,
    )
    return finish(config, tmp_path / "run")


def test_the_template_that_was_trained_with_goes_with_the_adapter(chat: Finished) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(chat.folder / "adapter")
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word1"}], tokenize=False, add_generation_prompt=True
    )
    assert told == "<|im_start|>user\nword1<|im_end|>\n<|im_start|>assistant\n"


def test_the_summary_has_validation_figures_labels_and_settings(finished: Finished) -> None:
    best = finished.result.best_step
    summary = json.loads((finished.folder / "summary.json").read_text())
    one = summary["methods"]["lora"]
    lines = [line for line in read_lines(finished.folder / "metrics.jsonl") if line["step"] == best]
    (accuracy,) = (line["validation/accuracy"] for line in lines if "validation/accuracy" in line)
    assert one["validation"]["accuracy"] == accuracy and one["best_step"] == best
    assert one["method"]["name"] == "lora"
    assert summary["labels"] == sorted(LABELS) and summary["problem"] == "single_label"
    assert summary["config"]["optimizer"]["learning_rate"] == 1e-2
