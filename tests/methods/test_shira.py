"""SHiRA's own: places in files, those that cannot be, and ranks that ask for too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError
from tests.core.helpers import load
from tests.hub.helpers import assert_bit_equal

WEIGHTS = "adapter_model.safetensors"
METHOD = jaxpeft.SHiRA(rank=2, targets=("q_proj", "down_proj"))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Any, Any]:
    model, base = load("llama")
    params = jaxpeft.rewrite(METHOD, base, jax.random.key(0))
    jaxpeft.save_adapter(tmp_path, METHOD, params, model)
    return model, base, params


def edited(folder: Path, change: Callable[[Any], Any]) -> None:
    """Change the places in a folder as if PEFT had written it, without our own file and its
    hashes.
    """
    (folder / "jaxpeft.json").unlink()
    tensors = load_file(folder / WEIGHTS)
    name = "base_model.model.model.layers.1.mlp.down_proj.shira_indices"
    save_file({**tensors, name: change(tensors[name])}, folder / WEIGHTS)


def test_places_are_all_different_and_in_files_whole_numbers(saved: Any, tmp_path: Path) -> None:
    _, _, params = saved
    indices = np.asarray(params["model"]["layers"]["0"]["mlp"]["down_proj"]["shira_indices"])
    assert len(set(map(tuple, indices.T.tolist()))) == indices.shape[1]
    tensors = load_file(tmp_path / WEIGHTS)
    assert {name.rpartition(".")[2]: t.dtype.name for name, t in tensors.items()} == {
        "shira_indices": "int32",
        "shira_weight": "float32",
    }


def test_places_that_were_written_as_floating_numbers_are_read(saved: Any, tmp_path: Path) -> None:
    """As PEFT writes them on Windows."""
    model, base, params = saved
    edited(tmp_path, lambda indices: indices.astype(np.float32))
    assert_bit_equal(jaxpeft.load_adapter(tmp_path, model, base)[1], params)


@pytest.mark.parametrize("wrong", [-1, 48, 32.5])
def test_places_that_the_kernel_has_not_are_refused(
    saved: Any, tmp_path: Path, wrong: float
) -> None:
    model, base, _ = saved

    def change(indices: Any) -> Any:
        return np.concatenate([indices[:, :-1], np.array([[0], [wrong]])], axis=1).astype(
            np.float32
        )

    edited(tmp_path, change)
    with pytest.raises(
        AdapterError,
        match=r"layers\.1\.mlp\.down_proj\.shira_indices: has indices outside of the kernel, 32 outputs",
    ):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_whole_numbers_in_place_of_floating_ones_are_refused(saved: Any, tmp_path: Path) -> None:
    model, base, _ = saved
    tensors = load_file(tmp_path / WEIGHTS)
    whole = {
        name: t.astype(np.int32) if name.endswith("shira_weight") else t
        for name, t in tensors.items()
    }
    save_file(whole, tmp_path / WEIGHTS)
    with pytest.raises(AdapterError, match=r"not floating: .*shira_weight is int32"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_a_rank_that_asks_for_more_than_the_kernel_has_is_refused() -> None:
    _, base = load("llama")
    with pytest.raises(
        ConfigError,
        match=r"shira.rank: 32 needs 2048 entries of the kernel of .*, which has 1024",
    ):
        jaxpeft.rewrite(jaxpeft.SHiRA(targets=("q_proj",)), base, jax.random.key(0))
