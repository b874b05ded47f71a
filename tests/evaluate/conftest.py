"""Tiny trained adapters to evaluate, one of each problem, trained once."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxpeft.evaluate.__main__ import main
from jaxpeft.train import job
from jaxpeft.train.run import RunResult
from tests.train.runs import LABELS, WORDS, short_config, tiny_models, write_rows

__all__ = ["tiny_models"]
LEARNS = {
    "optimizer__learning_rate": 3e-2,
    "optimizer__head_learning_rate": 0.1,
    "train__steps": 30,
}


@dataclass(frozen=True)
class Trained:
    """A finished run.

    Attributes:
        folder: its folder.
        rows: a file of rows that it was tested on.
        result: its result, with the metrics of these rows.
    """

    folder: Path
    rows: Path
    result: RunResult


def write_multi_label(path: Path, n: int, seed: int) -> Path:
    """Write rows with the labels whose words they contain."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        chosen = [i for i in range(len(LABELS)) if rng.uniform() < 0.5]
        words = [*(WORDS[i] for i in chosen), *rng.choice(WORDS[3:], 4)]
        rows.append({"text": " ".join(words), "labels": [LABELS[i] for i in chosen]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_answers(path: Path, n: int = 40) -> Path:
    """Write texts with a question and an answer, to be split at ` word9 `."""
    rng = np.random.default_rng(0)
    rows = [
        f"{' '.join(rng.choice(WORDS[10:], 3))} word9 {WORDS[i % 3]} {WORDS[4]}" for i in range(n)
    ]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def trained(tiny_models: Mapping[str, Path], tmp_path_factory: Any) -> Callable[[str], Trained]:
    """Train the tiny adapter of a kind of rows."""
    known: dict[str, Trained] = {}

    def train(kind: str) -> Trained:
        if kind in known:
            return known[kind]
        folder = tmp_path_factory.mktemp(kind)
        options: dict[str, Any] = dict(LEARNS)
        rows = folder / "test.jsonl"
        if kind == "multi":
            options["data__train"] = str(write_multi_label(folder / "train.jsonl", 60, 0))
            write_multi_label(rows, 40, 1)
        elif kind == "answers":
            options["data__train"] = str(write_answers(folder / "train.jsonl"))
            options |= {"data__separator": " word9 ", "model__path": str(tiny_models["llama"])}
            options |= {"model__task": "causal_lm", "optimizer__head_learning_rate": None}
            write_answers(rows, 20)
        else:
            write_rows(rows, kind, 40)
        if kind == "text":
            options["optimizer__head_learning_rate"] = None
        if kind == "regression":
            options["data__problem"] = "regression"
        if kind == "tags":
            options["model__task"] = "token_classification"
        base = "single" if kind in ("multi", "answers") else kind
        config = short_config(tiny_models, folder, base, data__test=str(rows), **options)
        known[kind] = Trained(folder / "run", rows, job.run(config, folder / "run"))
        return known[kind]

    return train


@pytest.fixture
def evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """Run the command; return its JSON and what it prints, or its exit code and error."""

    def run(*words: Any, fails: bool = False) -> Any:
        path = tmp_path / "out.json"
        code = main([*map(str, words), "--json", str(path), "--resamples=50"])
        shown = capsys.readouterr()
        if fails:
            assert code == 2, shown
            assert not path.exists()
            return shown.err
        assert code == 0, shown.err
        return json.loads(path.read_text()), shown.out

    return run
