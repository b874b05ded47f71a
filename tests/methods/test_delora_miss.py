"""DeLoRA's and MiSS's own: the bound of the update, shards that do not fit, and the real `peft` in
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
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
SITES = ["q_proj", "down_proj"]
RNG = np.random.default_rng(0)


def test_delora_s_update_is_no_longer_than_the_boundary_times_the_kernel() -> None:
    kernel = jnp.asarray(RNG.normal(size=(20, 12)), jnp.float32)
    method = jaxpeft.DeLoRA(rank=3, boundary=0.5)
    leaves = method.init(Site(("proj",), ("proj",), (20, 12)), lambda: kernel, jax.random.key(0))
    for size in (0.01, 1.0, 100.0):
        b = jnp.asarray(size * RNG.normal(size=(3, 12)), jnp.float32)
        update = method.fold({**leaves, "delora_b": b}, {"kernel": kernel})["kernel"] - kernel
        assert (
            0.01
            < float(jnp.linalg.norm(update))
            <= 0.5 * float(jnp.abs(leaves["delora_w_norm"]).max())
        )


@pytest.mark.parametrize(
    ("method", "config", "size", "theirs"),
    [
        (
            jaxpeft.DeLoRA(
                rank=3,
                boundary=1.0,
                rank_pattern={"1.mlp.down_proj": 2},
                boundary_pattern={"q_proj": 2.0},
                targets=SITES,
            ),
            "DeloraConfig",
            0.2,
            {
                "r": 3,
                "delora_lambda": 1,
                "rank_pattern": {"1.mlp.down_proj": 2},
                "lambda_pattern": {"q_proj": 2},
            },
        ),
        (
            jaxpeft.MiSS(rank=7, variant="mini", mini_rank=4, dropout=0.1, targets=SITES),
            "MissConfig",
            0.05,
            {"r": 7, "init_weights": "mini", "mini_r": 4, "miss_dropout": 0.1},
        ),
    ],
)
@pytest.mark.representatives("method1-*")
def test_variants_go_both_ways_with_the_real_peft(
    reference: Any,
    tmp_path: Path,
    method: Any,
    config: str,
    size: float,
    theirs: Any,
) -> None:
    case = case_of(method, "llama", config, size, target_modules=SITES, **theirs)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    gap, loaded = imported(reference, tmp_path / "theirs", case)
    assert gap < 1e-4
    same = {"targets": method.targets}
    assert loaded.as_dict() | same == method.as_dict() | same


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 33}, "miss: the kernel of proj, 32 by 12, is not divisible by rank 33"),
        ({"rank": 8, "variant": "bat"}, "is not divisible by rank 8"),
        (
            {"rank": 8, "variant": "mini", "mini_rank": 5},
            "is not divisible by rank 8 and mini_rank 5",
        ),
    ],
)
def test_shards_that_do_not_fit_are_refused(options: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        jaxpeft.MiSS(**options).init(
            Site(("proj",), ("proj",), (32, 12)), lambda: None, jax.random.key(0)
        )
