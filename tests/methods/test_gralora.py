"""GraLoRA's own: without the plain LoRA and with more blocks, and what does not divide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from tests.core.helpers import load, run
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ("q_proj", "down_proj")


@pytest.mark.slow
def test_four_blocks_without_a_plain_lora_go_both_ways(reference: Any, tmp_path: Path) -> None:
    method = jaxpeft.GraLoRA(rank=8, blocks=4, alpha=12.0, targets=SITES, layers_to_transform=(0,))
    options = {
        "r": 8,
        "gralora_k": 4,
        "alpha": 12,
        "target_modules": list(SITES),
        "layers_to_transform": [0],
    }
    case = case_of(method, "llama", "GraloraConfig", **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-4
    assert (found.rank, found.blocks, found.hybrid_rank, found.alpha) == (8, 4, 0, 12.0)


def test_one_block_is_lora() -> None:
    model, base = load("llama")
    granular = jaxpeft.GraLoRA(rank=4, blocks=1, alpha=6.0, targets=SITES)
    plain = jaxpeft.LoRA(rank=4, alpha=6.0, targets=SITES)
    ours, theirs = (jaxpeft.rewrite(m, base, jax.random.key(0)) for m in (granular, plain))
    rng = np.random.default_rng(0)
    random = {
        path: jnp.asarray(rng.normal(size=leaf.shape, scale=0.2), jnp.float32)
        for path, leaf in paths.walk(theirs)
        if path[-1] in ("lora_a", "lora_b")
    }
    assert len(random) == 8
    theirs = paths.map_with_path(lambda path, leaf: random.get(path, leaf), theirs)
    ours = paths.map_with_path(
        lambda path, leaf: random.get((*path[:-1], path[-1].replace("gra", "")), leaf), ours
    )
    ours = paths.map_with_path(
        lambda path, leaf: leaf[None] if path[-1] in ("gralora_a", "gralora_b") else leaf, ours
    )
    np.testing.assert_allclose(run(model, ours), run(model, theirs), rtol=1e-4, atol=1e-4)


def test_what_does_not_divide_is_refused() -> None:
    _, base = load("llama")
    with pytest.raises(ConfigError, match="rank: 5 is not a multiple of blocks, 2"):
        jaxpeft.GraLoRA(rank=5)
    with pytest.raises(
        ConfigError,
        match=r"gralora.blocks: 3 does not divide the 32 inputs and 32 outputs of model\.layers\.0",
    ):
        jaxpeft.rewrite(
            jaxpeft.GraLoRA(rank=6, blocks=3, targets=("q_proj",)), base, jax.random.key(0)
        )
