"""What a run decided goes with its adapter, and what it prints at its end predicts."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jaxpeft
from jaxpeft.config.schema import Config
from jaxpeft.train import job
from jaxpeft.train.records import read_lines
from tests.train.runs import LABELS, SPECIAL, WORDS

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


def end_of(caplog: pytest.LogCaptureFixture) -> str:
    """Return the Python that a run printed last."""
    (told,) = (
        message
        for r in caplog.records
        if (message := r.getMessage()).startswith("next, use the adapter:\n")
    )
    return "\n".join(line[2:] for line in told.splitlines()[1:])


@pytest.mark.parametrize("kind", ["single", "pair", "regression", "text", *ROWS])
@pytest.mark.representatives("chat", "single")
def test_what_is_printed_at_the_end_predicts(
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    tiny_models: Any,
) -> None:
    caplog.set_level(logging.INFO, "jaxpeft")
    options: dict[str, Any] = {"train__steps": 3} | (
        {"data__problem": kind} if kind == "regression" else {}
    )
    if kind in ROWS:
        rows, more = ROWS[kind]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        options |= more | {"data__train": str(tmp_path / "rows.jsonl")}
        if "model__task" in more:
            options["model__path"] = str(tiny_models["bert"])
    plain = kind in ("single", "pair", "regression") or "model__task" in options
    config = make_config(
        kind if kind in ("single", "pair", "regression", "text") else "single" if plain else "text",
        **options,
    )
    job.run(config, tmp_path / "run")
    capsys.readouterr()
    exec(end_of(caplog), {})
    printed = capsys.readouterr().out.removesuffix("\n")
    found = jaxpeft.read_settings(tmp_path / "run" / "adapter")
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


def test_the_template_that_was_trained_with_goes_with_the_adapter(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    config = make_config(
        "text",
        data__train=str(tmp_path / "rows.jsonl"),
        data__chat_template="chatml",
        train__steps=3,
    )
    job.run(config, tmp_path / "run")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "run" / "adapter")
    told = tokenizer.apply_chat_template(
        [{"role": "user", "content": "word1"}], tokenize=False, add_generation_prompt=True
    )
    assert told == "<|im_start|>user\nword1<|im_end|>\n<|im_start|>assistant\n"


def test_the_summary_has_validation_figures_labels_and_settings(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(train__steps=4, evaluation__every_steps=2, log__plot=True)
    best = job.run(config, tmp_path / "run").best_step
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    one = summary["methods"]["lora"]
    lines = [
        line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["step"] == best
    ]
    (accuracy,) = (line["validation/accuracy"] for line in lines if "validation/accuracy" in line)
    assert one["validation"]["accuracy"] == accuracy and one["best_step"] == best
    assert one["method"]["name"] == "lora"
    assert summary["labels"] == sorted(LABELS) and summary["problem"] == "single_label"
    assert summary["config"]["optimizer"]["learning_rate"] == 1e-2
