"""HiRA's own: layers, dropout, and an option that PEFT makes no use of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from tests.core.helpers import load, run
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ("q_proj", "down_proj")


@pytest.mark.slow
def test_chosen_layers_go_both_ways_and_ranks_by_site_say_nothing(
    reference: Any, tmp_path: Path
) -> None:
    method = jaxpeft.HiRA(rank=3, targets=SITES, layers_to_transform=(1,))
    options = {
        "r": 3,
        "target_modules": list(SITES),
        "layers_to_transform": [1],
        "rank_pattern": {"q_proj": 2},
    }
    case = case_of(method, "llama", "HiraConfig", size=0.7, **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.rank, found.layers_to_transform) == (3, (1,))


def test_dropout_leaves_out_inputs_of_the_update_in_training_alone() -> None:
    model, base = load("llama")
    method = jaxpeft.HiRA(rank=3, dropout=0.5, targets=SITES)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    params = jax.tree.map_with_path(
        lambda path, x: x + 1.0 if path[-1].key == "hira_b" else x, params
    )
    one, two = (run(model, params, {"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_array_equal(run(model, params), run(model, params))
