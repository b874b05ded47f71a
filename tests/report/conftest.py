"""Folders of runs, as a run leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.config.schema import Config, as_dict
from tests.train.runs import make_config, tiny_models

__all__ = ["make_config", "tiny_models"]
START = {
    "steps": 40,
    "metric": "accuracy",
    "problem": "single_label",
    "labels": ["red", "green", "blue"],
    "trainable_parameters": 1_200,
    "total_parameters": 48_000,
    "base_sha256": "b" * 64,
    "rows": {"train": {"rows": 48, "tokens": 600}, "validation": {"rows": 12, "tokens": 150}},
    "data": {"sources": {"train": "c" * 64, "validation": "d" * 64}, "tokenizer": "e" * 64},
    "environment": {"jaxpeft": "0.1.0", "jax": "0.10.2", "device": "tiny", "devices": 8},
}
EVALUATION = {
    "version": 1,
    "model": "run/adapter",
    "against": "base /data/models/stories260K/hf",
    "notes": ["the base has no head"],
    "data": {"path": "test.jsonl", "rows": 200, "problem": "single_label"},
    "bootstrap": {"level": 0.9, "seed": 0, "resamples": 1000},
    "metrics": {
        "accuracy": {
            "value": 0.8,
            "low": 0.7,
            "high": 0.9,
            "against": {"value": 0.2, "low": 0.1, "high": 0.3},
            "difference": {"value": 0.6, "low": 0.5, "high": 0.7},
            "p": 2 / 1001,
        },
        "loss": {"value": 2.5, "low": 2.0, "high": 3.0},
    },
    "paired": {"wins": {"accuracy": {"wins": 130, "losses": 10, "ties": 60, "p": 1e-9}}},
    "classes": [
        {"label": "red", "precision": 0.9, "recall": 0.8, "f1": 0.85, "support": 120},
        {"label": "lost", "precision": 0.5, "recall": 0.25, "f1": 0.3333, "support": 80},
    ],
    "confusion": {"labels": ["red", "lost"], "counts": [[96, 24], [60, 20]]},
    "calibration": {
        "edges": [0.0, 0.5, 1.0],
        "counts": [0, 200],
        "confidence": [0.0, 0.9],
        "accuracy": [0.0, 0.58],
        "ece": 0.32,
    },
    "changed": [1],
    "rows": [
        {"input": "a"},
        {
            "input": "my card",
            "truth": "lost",
            "prediction": "lost",
            "against": {"prediction": "stolen"},
        },
    ],
    "forgetting": {
        "path": "stories.txt",
        "rows": 50,
        "metrics": {"loss": {"value": 1.75, "low": None, "high": None}},
        "kl": {"value": 0.25, "low": 0.2, "high": 0.3},
        "changed_answers": {"value": 0.98, "low": 0.94, "high": 1.0},
    },
}
"""What `python -m jaxpeft.evaluate --json` writes, shortened."""
SAMPLE = {"prompt": "table: people", "expected": "SELECT a", "base": "", "tuned": "SELECT b"}


def step_lines(count: int) -> list[dict[str, Any]]:
    """Return lines of steps, with a validation every tenth."""
    lines: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        lines.append({"step": step, "loss": 4 / step, "grad_norm": 1.0, "learning_rate": 1e-3})
        if step % 10 == 0:
            lines.append({"step": step, "tokens_per_second": 900.0 + step, "memory_gb": 1.5})
            lines.append({"step": step, "validation/loss": 5 / step, "validation/accuracy": 0.7})
    return lines


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(content))


WriteRun = Callable[..., Path]


@pytest.fixture
def write_run(make_config: Callable[..., Config], tmp_path: Path) -> WriteRun:
    """Write the folder of a run; `parts` are its files without endings, None for one without."""

    def write(kind: str = "single", **parts: Any) -> Path:
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        config = make_config(kind, method__rank=4, train__steps=40)
        own = {
            "loss": 0.5,
            "accuracy": 0.9,
        }
        summary = {
            "metric": "accuracy",
            "before": {"loss": 1.2, "accuracy": 0.3},
            "methods": {
                "lora": {
                    "validation": own,
                    "steps": 40,
                    "best_step": 30,
                    "seconds": 61.5,
                    "trainable_parameters": 1_200,
                    "total_parameters": 48_000,
                }
            },
            "prediction": "  import jaxpeft\n  print('used')",
        }
        contents = {
            "config": as_dict(config),
            "run": START,
            "summary": summary,
            "metrics": step_lines(40),
            "samples": [],
            **parts,
        }
        for name in ("config", "run", "summary", "before", "result"):
            if contents.get(name) is not None:
                write_json(folder / f"{name}.json", contents[name])
        for name in ("metrics", "samples"):
            if contents[name]:
                lines = "".join(json.dumps(line) + "\n" for line in contents[name])
                (folder / f"{name}.jsonl").write_text(lines)
        return folder

    return write
