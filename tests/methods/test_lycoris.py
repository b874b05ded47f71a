"""LoHa's and LoKr's own: shapes, options, the two ways to compute, dropout, and the real `peft` in
all variants.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.methods import loha
from jaxpeft.methods.lokr import factors
from tests.core.helpers import load
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ["q_proj", "down_proj"]
RNG = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("rank", [2, 6])
def test_loha_computes_alike_by_pairs_of_columns_and_by_the_whole_matrix(rank: int) -> None:
    leaves = {
        f"loha_{n}": random(*s)
        for n, s in {
            "w1_a": (rank, 24),
            "w1_b": (20, rank),
            "w2_a": (rank, 24),
            "w2_b": (20, rank),
        }.items()
    }
    leaves["loha_scale"] = jnp.asarray(0.5)
    x = random(3, 20)
    whole = (leaves["loha_w1_b"] @ leaves["loha_w1_a"]) * (
        leaves["loha_w2_b"] @ leaves["loha_w2_a"]
    )
    np.testing.assert_allclose(loha._update(leaves, x), 0.5 * x @ whole, rtol=1e-4, atol=1e-4)  # pyright: ignore[reportPrivateUsage]


@pytest.mark.parametrize("n", [1, 2, 7, 12, 32, 48, 127, 128, 768, 3072, 11008])
@pytest.mark.parametrize("near", [-1, 1, 3, 4, 6, 8, 10, 100, 5000])
def test_lokr_splits_numbers_as_peft_does(n: int, near: int) -> None:
    from peft.tuners.lokr.layer import factorization

    assert factors(n, near) == factorization(n, near)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config", "theirs"),
    [
        (
            jaxpeft.LoHa(
                rank=3,
                targets=SITES,
                rank_pattern={"1.mlp.down_proj": 2},
                alpha_pattern={"q_proj": 3.0},
            ),
            "LoHaConfig",
            {
                "r": 3,
                "alpha": 16,
                "rank_pattern": {"1.mlp.down_proj": 2},
                "alpha_pattern": {"q_proj": 3},
            },
        ),
        (
            jaxpeft.LoKr(rank=16, targets=SITES),
            "LoKrConfig",
            {"r": 16, "alpha": 16, "init_weights": "lycoris"},
        ),
        (
            jaxpeft.LoKr(rank=2, targets=SITES, rank_pattern={"1.mlp.down_proj": 1}),
            "LoKrConfig",
            {
                "r": 2,
                "alpha": 16,
                "rank_pattern": {"1.mlp.down_proj": 1},
                "module_dropout": 0.5,
                "rank_dropout": 0.1,
            },
        ),
    ],
)
@pytest.mark.representatives("method0-*")
def test_variants_go_both_ways_with_the_real_peft(
    reference: Any,
    tmp_path: Path,
    method: Any,
    config: str,
    theirs: Any,
) -> None:
    case = case_of(method, "llama", config, 0.1, target_modules=SITES, **theirs)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    gap, loaded = imported(reference, tmp_path / "theirs", case)
    assert gap < 1e-4
    assert (loaded.rank_pattern, loaded.alpha_pattern) == (
        method.rank_pattern,
        method.alpha_pattern,
    )
    assert loaded.module_dropout == theirs.get("module_dropout", 0)


def test_outputs_that_stay_grow_by_as_much_as_others_are_left_out() -> None:
    import flax.linen as nn

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(40, use_bias=False, name="proj")(x)

    x = random(3, 8)
    for method, grows in (
        (jaxpeft.LoHa(rank=2, rank_dropout=0.5), True),
        (jaxpeft.LoKr(rank=2, rank_dropout=0.5), False),
        (jaxpeft.LoKr(rank=2, rank_dropout=0.5, rank_dropout_scale=True), True),
    ):
        params = jaxpeft.rewrite(
            method, {"proj": {"kernel": jnp.zeros((8, 40))}}, jax.random.key(0)
        )
        params["proj"] = {
            k: random(*v.shape) if k in method.leaves.trained else v
            for k, v in params["proj"].items()
        }
        whole = jaxpeft.apply(Holder(), params, x)
        dropped = jaxpeft.apply(Holder(), params, x, rngs={"dropout": jax.random.key(1)})
        ratio = np.asarray(dropped / whole)
        kept = ratio[0] > 0
        assert 5 < kept.sum() < 35
        np.testing.assert_array_equal(ratio[:, ~kept], 0)
        np.testing.assert_allclose(ratio[:, kept], 40 / kept.sum() if grows else 1.0, rtol=1e-4)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"lokr\.decompose_factor: must be -1 or at least 1, is 0"
    ):
        jaxpeft.LoKr(decompose_factor=0)
    _, base = load("llama", scan_layers=True)
    mixed = jaxpeft.LoKr(rank=2, targets=("down_proj",), rank_pattern={"1.mlp.down_proj": 16})
    with pytest.raises(
        ConfigError,
        match=r"lokr: the layers of model/layers/mlp/down_proj are stacked, but with these options",
    ):
        jaxpeft.rewrite(mixed, base, jax.random.key(0))
    jaxpeft.rewrite(mixed, load("llama")[1], jax.random.key(0))
    pair = [jaxpeft.LoKr(rank=2, targets=("q_proj",), decompose_factor=n) for n in (2, 4)]
    with pytest.raises(
        ConfigError, match="which lokr cannot pad; give all adapters the same options"
    ):
        jaxpeft.bank(
            [(method, jaxpeft.rewrite(method, base, jax.random.key(0))) for method in pair]
        )
