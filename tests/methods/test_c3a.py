"""C3A's own: block sizes by site, how it begins, and sites that do not make whole blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError, TargetError
from tests.core.helpers import load, run
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ("q_proj", "down_proj")


@pytest.mark.slow
def test_block_sizes_by_site_go_both_ways(reference: Any, tmp_path: Path) -> None:
    sizes = {"mlp.down_proj": 16}
    method = jaxpeft.C3A(block_size=4, targets=SITES, block_size_pattern=sizes)
    options = {"block_size": 4, "target_modules": list(SITES), "block_size_pattern": sizes}
    case = case_of(method, "llama", "C3AConfig", size=1.0, **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.block_size, found.block_size_pattern) == (4, sizes)


@pytest.mark.parametrize("begun", ["xavier_uniform", "kaiming_uniform", "gaussian"])
def test_the_other_starts_change_the_outputs_and_say_so(begun: Any) -> None:
    model, base = load("llama")
    method = jaxpeft.C3A(block_size=8, targets=SITES, init_weights=begun)
    assert not method.fresh_is_base and jaxpeft.C3A().fresh_is_base
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    assert np.abs(run(model, fresh) - run(model, base)).max() > 1e-4


def test_a_site_that_does_not_make_whole_blocks_is_named() -> None:
    _, base = load("llama")
    with pytest.raises(
        ConfigError,
        match=r"c3a.block_size: 256 does not divide the 32 inputs and 32 outputs of .*such as 32",
    ):
        jaxpeft.rewrite(jaxpeft.C3A(targets=("q_proj",)), base, jax.random.key(0))
    with pytest.raises(
        TargetError,
        match=r"PEFT would interpret 'q_proj\|down_proj' differently; use the end of a site's name",
    ):
        jaxpeft.rewrite(
            jaxpeft.C3A(targets=SITES, block_size_pattern={"q_proj|down_proj": 2}),
            base,
            jax.random.key(0),
        )
    _, stacked = load("llama", scan_layers=True)
    mixed = jaxpeft.C3A(block_size=4, targets=SITES, block_size_pattern={"1.mlp.down_proj": 16})
    with pytest.raises(
        ConfigError,
        match=r"c3a: the layers of model/layers/mlp/down_proj are stacked, but .* have different sizes",
    ):
        jaxpeft.rewrite(mixed, stacked, jax.random.key(0))
    with pytest.raises(TargetError, match="block_size_pattern: 'v_proj' matches no adapted site"):
        jaxpeft.rewrite(
            jaxpeft.C3A(targets=SITES, block_size_pattern={"v_proj": 2}), base, jax.random.key(0)
        )
