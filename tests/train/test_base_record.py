"""A base that has changed between two starts of a run is told by its tensor."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxpeft.errors import ConfigError
from jaxpeft.train import base_record, job

TENSORS = {f"layer.{i}": "ab" * 32 for i in range(5)}


def test_a_changed_tensor_is_named(tmp_path: Path) -> None:
    assert base_record.find_changes(tmp_path, TENSORS) == []
    base_record.write(tmp_path, TENSORS)
    assert base_record.find_changes(tmp_path, TENSORS) == []
    assert (
        base_record.find_changes(
            tmp_path, {f"bert.{name}": found for name, found in TENSORS.items()}
        )
        == []
    )
    (problem,) = base_record.find_changes(tmp_path, TENSORS | {"layer.3": "c" * 64})
    assert problem.startswith(
        f"base: tensor layer.3 has changed since the run started ({tmp_path / 'base.json'}); download"
    )
    problems = base_record.find_changes(tmp_path, dict.fromkeys(TENSORS, "c" * 64))
    assert len(problems) == 4 and problems[-1] == "... and 2 more of 5 tensors"
    base_record.require_same(problems, ["base"])
    with pytest.raises(
        ConfigError, match=r"base: tensor layer\.0 has changed since the run started"
    ):
        base_record.require_same(problems, ["config.train"])


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"sha256": 3}', '{"sha256": {"layer.0": 3}}', "{}"]
)
def test_a_record_that_cannot_be_read_is_told(tmp_path: Path, content: str) -> None:
    (tmp_path / "base.json").write_text(content)
    (problem,) = base_record.find_changes(tmp_path, TENSORS)
    assert "base.json" in problem and "remove it" in problem


@pytest.mark.slow
@pytest.mark.parametrize("name", ["encoder.layer.1.output.dense.weight", "classifier.weight"])
def test_a_run_does_not_go_on_with_a_base_of_which_a_bit_is_flipped(
    make_config: Any, tmp_path: Path, tiny_models: Any, name: str
) -> None:
    base = shutil.copytree(tiny_models["bert"], tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    if name == "classifier.weight":  # a head that is kept is no part of what makes a base the same
        own = {
            "classifier.weight": np.ones((3, 32), np.float32),
            "classifier.bias": np.zeros(3, np.float32),
        }
        tensors = {f"bert.{key}": tensor for key, tensor in tensors.items()} | own
        save_file(tensors, base / "model.safetensors")
        settings = json.loads((base / "config.json").read_text())
        names = {str(i): label for i, label in enumerate(("blue", "green", "red"))}
        (base / "config.json").write_text(json.dumps(settings | {"id2label": names}))
    else:
        name = next(key for key in tensors if key.endswith(name))
    config = make_config(model__path=str(base), train__steps=3)
    job.run(config, tmp_path / "run")
    tensors[name].view(np.uint32).reshape(-1)[0] ^= 1
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(ConfigError) as caught:
        job.run(config, tmp_path / "run")
    assert str(caught.value).startswith(f"base: tensor {name} has changed since the run started (")
    job.run(make_config(model__path=str(base), train__steps=3), tmp_path / "another")
