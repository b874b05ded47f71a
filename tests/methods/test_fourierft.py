"""FourierFT's own: numbers of frequencies by site, other seeds, and trees of another seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError
from tests.core.helpers import load, run
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ("q_proj", "down_proj")


@pytest.mark.slow
def test_another_seed_and_numbers_by_site_go_both_ways(reference: Any, tmp_path: Path) -> None:
    numbers = {"mlp.down_proj": 12}
    method = jaxpeft.FourierFT(
        frequencies=30, frequencies_pattern=numbers, location_seed=5, scaling=90.0, targets=SITES
    )
    options = {
        "n_frequency": 30,
        "n_frequency_pattern": numbers,
        "random_loc_seed": 5,
        "scaling": 90.0,
    }
    case = case_of(
        method, "llama", "FourierFTConfig", size=2.0, target_modules=list(SITES), **options
    )
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.frequencies, found.frequencies_pattern, found.location_seed) == (30, numbers, 5)


@pytest.mark.parametrize("scan", [False, True])
def test_a_tree_of_another_seed_is_not_saved(tmp_path: Path, scan: bool) -> None:
    model, base = load("llama", scan_layers=scan)
    params = jaxpeft.rewrite(
        jaxpeft.FourierFT(frequencies=30, targets=SITES), base, jax.random.key(0)
    )
    other = jaxpeft.FourierFT(frequencies=30, targets=SITES, location_seed=5)
    with pytest.raises(
        AdapterError, match=r"fourierft_indices is \d+ in the tree, the method makes \d+"
    ):
        jaxpeft.save_adapter(tmp_path, other, params, model)


def test_a_random_start_changes_the_outputs_and_says_so() -> None:
    model, base = load("llama")
    method = jaxpeft.FourierFT(frequencies=30, targets=SITES, init_weights="gaussian")
    assert not method.fresh_is_base and jaxpeft.FourierFT().fresh_is_base
    assert (
        np.abs(
            run(model, jaxpeft.rewrite(method, base, jax.random.key(0))) - run(model, base)
        ).max()
        > 1e-3
    )


def test_numbers_by_layer_need_layers_that_are_not_stacked(reference: Any, tmp_path: Path) -> None:
    model, base = load("llama")
    method = jaxpeft.FourierFT(
        frequencies=30, frequencies_pattern={"1.mlp.down_proj": 12}, targets=SITES
    )
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    jaxpeft.save_adapter(tmp_path, method, params, model)
    stacked, base = load("llama", scan_layers=True)
    with pytest.raises(
        AdapterError, match="fourierft: the layers of model/layers/mlp/down_proj are stacked"
    ):
        jaxpeft.load_adapter(tmp_path, stacked, base)


def test_more_frequencies_than_there_are_are_refused() -> None:
    _, base = load("llama")
    with pytest.raises(
        ConfigError,
        match=r"fourierft.frequencies: 2000 is more than the 1024 of the kernel of model\.layers",
    ):
        jaxpeft.rewrite(
            jaxpeft.FourierFT(frequencies=2000, targets=("q_proj",)), base, jax.random.key(0)
        )
