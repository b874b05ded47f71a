"""Comparisons as they are written, for tests of their pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxpeft.compare import table
from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config


def write_comparison(folder: Path, failed: str = "it broke", **more: Any) -> Path:
    """Write a comparison of three methods over two seeds, of which one failed; return its page."""
    values = defaults("lora").to_dict()
    names = ("full", "lora", "bitfit")
    values["compare"] |= {"candidates": [{"method": {"name": name}} for name in names]}
    values["compare"] |= {"seeds": (0, 1), "forgetting": "a/b/c.jsonl"}
    values["data"]["train"] = "rows.jsonl"
    values["model"] |= {"path": "/home/me/models/tiny", "task": "sequence_classification"}
    values["train"]["steps"] = 3
    config, problems = parse_config(values)
    assert config is not None, problems
    result = {
        "metric": "accuracy",
        "split": "test",
        "before": {"accuracy": 0.1},
        "steps": 3,
        "best_step": 3,
        "seconds": 61.4,
        "trainable_parameters": 1_000,
        "total_parameters": 10_000,
        "peak_memory_gb": 1.5,
        "adapter_bytes": 4_100,
        "device": "cpu",
        "jax": "0.10",
        "forgetting": {"measure": "centroid_accuracy", "before": 0.8, "after": 0.75, "lost": 0.05},
        "prediction": "  print('used')",
        **more,
    }
    figures = {"full": (0.8, 0.9), "lora": (0.85, 0.97), "bitfit": ()}
    results = {
        name: [
            {**result, "test": {"accuracy": value}, "config": {"train": {"seed": seed}}}
            for seed, value in enumerate(values)
        ]
        for name, values in figures.items()
    }
    folder.mkdir()
    table.write(config, results, {"bitfit, seed 0": failed}, folder)
    return folder / "comparison.html"
