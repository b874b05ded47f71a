"""Uni-LoRA: how the vector is distributed over the sites, and files that do not say so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import AdapterError
from tests.core.helpers import load
from tests.hub.helpers import edit_json
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

KEY = jax.random.key(0)
BERT = r".*\.(query|intermediate\.dense|output\.dense)"


def joined(params: Any, kind: str) -> np.ndarray[Any, Any]:
    """Return all places or scales of a tree."""
    names = {f"unilora_{kind}_a", f"unilora_{kind}_b"}
    return np.concatenate(
        [np.ravel(leaf) for path, leaf in paths.walk(params) if path[-1] in names]
    )


@pytest.mark.parametrize("length", [50, 10**5], ids=["shorter", "longer than the matrices"])
def test_entries_occur_equally_often_over_all_sites_and_lengths_are_preserved(length: int) -> None:
    method = jaxpeft.UniLoRA(rank=2, length=length, targets=r".*\.(k_proj|down_proj)")
    params = jaxpeft.rewrite(method, load("llama")[1], KEY)
    places = joined(params, "indices")
    counts = np.bincount(places, minlength=length)
    assert len(places) == 2 * 2 * (32 + 16 + 48 + 32)
    assert counts.max() - counts.min() <= 1
    vector = np.random.default_rng(0).standard_normal(length).astype(np.float32)
    matrices = vector[places] * joined(params, "scales")
    np.testing.assert_allclose(
        np.sum(np.square(matrices)), np.sum(np.square(vector[counts > 0])), rtol=1e-5
    )


def test_where_they_are_depends_on_the_seed_alone() -> None:
    base = load("llama")[1]

    def drawn(seed: int, key: int) -> Any:
        method = jaxpeft.UniLoRA(projection_seed=seed, targets=("k_proj",))
        return joined(jaxpeft.rewrite(method, base, jax.random.key(key)), "indices")

    np.testing.assert_array_equal(drawn(1, 0), drawn(1, 1))
    assert np.mean(drawn(1, 0) == drawn(2, 0)) < 0.1


@quiet
@pytest.mark.slow
def test_biases_and_dropout_go_both_ways(reference: Any, tmp_path: Path) -> None:
    method = jaxpeft.UniLoRA(
        rank=3, length=40, projection_seed=7, dropout=0.1, bias="unilora_only", targets=BERT
    )
    options = {"r": 3, "theta_d_length": 40, "proj_seed": 7, "unilora_dropout": 0.1}
    case = case_of(
        method,
        "bert",
        "UniLoraConfig",
        bias="unilora_only",
        save_indices=True,
        target_modules=BERT,
        **options,
    )
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


def test_a_file_must_say_where_entries_of_the_vector_are(tmp_path: Path) -> None:
    model, base = load("llama")
    method = jaxpeft.UniLoRA(length=20, targets=("k_proj",))
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, KEY), model)
    (tmp_path / "jaxpeft.json").unlink()  # as PEFT writes a folder, without our hashes
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.k_proj.unilora_indices_B"
    save_file({**tensors, name: tensors[name] + 20}, file)
    with pytest.raises(
        AdapterError, match="unilora_indices_B: has places outside of the vector, of length 20"
    ):
        jaxpeft.load_adapter(tmp_path, model, base)
    edit_json(config, lambda values: values.update(save_indices=False))
    with pytest.raises(AdapterError, match="save_indices: is false, so the file does not say"):
        jaxpeft.load_adapter(tmp_path, model, base)
