"""Whole runs on a quantized base, by config."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxpeft
from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.schema import Config
from jaxpeft.errors import ConfigError
from jaxpeft.train import job
from jaxpeft.train.records import read_lines

MakeConfig = Callable[..., Config]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int4"])
def test_a_run_learns_says_what_its_base_was_and_is_loaded_again(
    make_config: MakeConfig, tmp_path: Path, form: str
) -> None:
    config = make_config(model__quant=form, model__quant_exclude=("pooler.dense",), train__steps=60)
    result = job.run(config, tmp_path / "run")
    losses = [
        line["loss"] for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "loss" in line
    ]
    assert np.mean(losses[-10:]) < 0.7 * np.mean(losses[:10])
    assert 0 < result.trainable_parameters < result.total_parameters
    saved = json.loads((tmp_path / "run" / "adapter" / "jaxpeft.json").read_text())
    assert saved["quant"] == {
        "form": form,
        "targets": "all-linear",
        "exclude": ["pooler.dense"],
        "group": None,
    }
    how = jaxpeft.Quant(form, exclude=("pooler.dense",))
    task: Any = config.model.task
    model, base = jaxpeft.load(config.model.path, task=task, num_labels=3, quant=how)
    method, params = jaxpeft.load_adapter(tmp_path / "run" / "adapter", model, base)
    assert (
        method.name == "lora"
        and "lora_a" in params["bert"]["encoder"]["layer"]["0"]["output"]["dense"]
    )
    assert "kernel" in params["bert"]["pooler"]["dense"]


def test_what_trains_the_base_is_refused_on_a_quantized_one(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="which is quantized"):
        job.run(make_config(method="full", model__quant="int8"), tmp_path / "run")


def test_a_group_goes_with_the_forms_that_have_them() -> None:
    found = ModelConfig(path="x", quant="nf4", quant_group=32).problems()
    assert found == ["quant_group: is only for quant 'int4' or 'int8', quant is 'nf4'; remove it"]
