"""Cartridges: which positions are trained, the start from tokens, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.train.data_start import Start
from tests.core.helpers import BATCH, load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import forward, reference  # noqa: F401 - a fixture

KEY = jax.random.key(0)


def test_the_first_positions_are_frozen() -> None:
    _, base = load("llama")
    for frozen in (0, 2):
        method = jaxpeft.Cartridge(num_virtual_tokens=5, frozen_tokens=frozen)
        params = jaxpeft.rewrite(method, base, KEY)
        mask = jaxpeft.trainable_mask(method, params)
        assert params["cartridge_trained"].shape == (5 - frozen, 2, 2, 16)
        assert mask["cartridge_trained"]
        assert mask.get("cartridge_frozen") == (False if frozen else None)
        assert method.table(params).shape == (5, 2, 2, 16)


@pytest.mark.slow
def test_one_that_starts_from_tokens_is_the_tokens_in_front_of_the_row() -> None:
    model, base = load("llama")
    method = jaxpeft.Cartridge(num_virtual_tokens=4, frozen_tokens=1, init_tokens=(7, 8, 9))
    fresh = jaxpeft.rewrite(method, base, KEY)
    begun, params = method.start(fresh, Start(model, base, KEY))
    assert begun == method
    front = np.tile([7, 8, 9, 7], (3, 1))
    mask = np.concatenate([np.ones_like(front), BATCH.mask], axis=1)
    wanted = forward(model, base, np.concatenate([front, BATCH.ids], axis=1), mask)[:, 4:]
    np.testing.assert_allclose(forward(model, params, BATCH.ids, BATCH.mask), wanted, atol=2e-5)
    plain = jaxpeft.Cartridge(num_virtual_tokens=4)
    assert plain.start(fresh, Start(model, base, KEY)) == (plain, fresh)


@quiet
@pytest.mark.slow
def test_files_without_frozen_positions_go_both_ways(reference: Any, tmp_path: Path) -> None:
    method = jaxpeft.Cartridge(num_virtual_tokens=5, frozen_tokens=0)
    case = case_of(method, "llama", "CartridgeConfig", num_virtual_tokens=5, num_frozen_tokens=0)
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


def test_one_without_a_trained_position_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"frozen_tokens: 5 is not less than num_virtual_tokens, 5"
    ):
        jaxpeft.Cartridge(num_virtual_tokens=5, frozen_tokens=5)
