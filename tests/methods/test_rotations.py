"""OFT's, BOFT's and HRA's own: orthogonality, blocks, and the real `peft` in all variants."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core.targets import Site
from jaxpeft.errors import AdapterError, ConfigError
from jaxpeft.hub.adapters import peft_config
from jaxpeft.methods import rotations
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = [
    quiet,
    pytest.mark.filterwarnings(
        "ignore:Invalid `(oft_block_size|r)`:UserWarning"
    ),  # it takes the nearest that divides
]
SITES = ["q_proj", "down_proj"]
RNG = np.random.default_rng(0)


def site(n_in: int, n_out: int = 6) -> Site:
    return Site(("proj",), ("proj",), (n_in, n_out))


def rotation(method: Any, n: int, size: float = 0.3) -> Any:
    """Return the matrix that a moved adapter multiplies its input with."""
    leaves = method.init(site(n, n), lambda: jnp.eye(n), jax.random.key(0))
    own = {
        k: (
            v + size * jnp.asarray(RNG.normal(size=v.shape), jnp.float32)
            if k.endswith(("_r", "_u"))
            else v
        )
        for k, v in leaves.items()
    }
    return np.asarray(method.fold(own, {"kernel": jnp.eye(n)})["kernel"])


@pytest.mark.parametrize(
    ("method", "error"),
    [
        (jaxpeft.OFT(block_size=4, neumann_terms=0), 1e-6),
        (jaxpeft.OFT(block_size=4, neumann_terms=12), 1e-2),
        (jaxpeft.BOFT(block_size=4, factors=3), 2e-6),
        (jaxpeft.HRA(rank=6), 2e-6),
        (jaxpeft.HRA(rank=3, gram_schmidt=True), 2e-6),
    ],
)
@pytest.mark.representatives("method2-*", "method4-*")
def test_the_input_is_multiplied_with_an_orthogonal_matrix(method: Any, error: float) -> None:
    turned = rotation(method, 16, size=0.1)
    assert np.abs(turned - np.eye(16)).max() > 0.05
    np.testing.assert_allclose(turned @ turned.T, np.eye(16), atol=error)


def test_hra_is_the_product_of_its_reflections() -> None:
    leaves = {"hra_u": jnp.asarray(RNG.normal(size=(10, 6)), jnp.float32)}
    wanted = np.eye(10)
    for u in np.asarray(leaves["hra_u"]).T[::-1]:
        wanted = wanted @ (np.eye(10) - 2 * np.outer(u, u) / (u @ u))
    np.testing.assert_allclose(
        jaxpeft.HRA.fold(leaves, {"kernel": jnp.eye(10)})["kernel"], wanted, atol=1e-5
    )


@pytest.mark.slow
def test_butterfly_factors_mix_inputs_that_no_block_holds() -> None:
    reach = [
        np.abs(rotation(jaxpeft.BOFT(block_size=4, factors=m), 32)) > 1e-6 for m in (1, 2, 3, 4)
    ]
    assert [int(r.sum(axis=0).max()) for r in reach] == [4, 8, 16, 32]


@pytest.mark.parametrize("n", [1, 7, 12, 32, 48, 768, 11008])
@pytest.mark.parametrize("wanted", [1, 2, 5, 10, 32, 100, 20000])
def test_blocks_give_way_to_the_divisor_that_peft_takes(n: int, wanted: int) -> None:
    from peft.tuners.oft import layer

    theirs: Any = layer.OFTLayer
    assert rotations.nearest_divisor(n, wanted) == theirs.adjust_oft_parameters(None, n, wanted)


@pytest.mark.parametrize(
    ("method", "config", "theirs"),
    [
        (
            jaxpeft.OFT(block_size=10, neumann_terms=0),
            "OFTConfig",
            {"oft_block_size": 10, "use_cayley_neumann": False},
        ),
        (
            jaxpeft.OFT(blocks=5, block_share=True, neumann_terms=3),
            "OFTConfig",
            {"r": 5, "oft_block_size": 0, "block_share": True, "num_cayley_neumann_terms": 3},
        ),
        (
            jaxpeft.OFT(block_size=8, eps=1.0, neumann_terms=2, dropout=0.1),
            "OFTConfig",
            {
                "oft_block_size": 8,
                "coft": True,
                "eps": 1.0,
                "num_cayley_neumann_terms": 2,
                "module_dropout": 0.1,
            },
        ),
        (jaxpeft.OFT(neumann_terms=7), "OFTConfig", {"num_cayley_neumann_terms": 7}),
        (
            jaxpeft.BOFT(blocks=4, factors=2),
            "BOFTConfig",
            {"boft_block_num": 4, "boft_block_size": 0, "boft_n_butterfly_factor": 2},
        ),
        (jaxpeft.BOFT(factors=3), "BOFTConfig", {"boft_n_butterfly_factor": 3}),
        (jaxpeft.HRA(rank=4, gram_schmidt=True), "HRAConfig", {"r": 4, "apply_GS": True}),
    ],
)
@pytest.mark.representatives("method6-*")
def test_variants_go_both_ways_with_the_real_peft(
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    config: str,
    theirs: Any,
) -> None:
    with_plain_blocks(monkeypatch)
    method = type(method)(
        **{k: v for k, v in method.as_dict().items() if k not in ("name", "targets")}, targets=SITES
    )
    case = case_of(method, "llama", config, 0.1, target_modules=SITES, **theirs)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    gap, loaded = imported(reference, tmp_path / "theirs", case)
    assert gap < 1e-4
    named = {"block_size": getattr(loaded, "block_size", None)} | {"targets": method.targets}
    assert loaded.as_dict() | named == method.as_dict() | named


def with_plain_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let BOFT in peft compute several butterfly factors without its CUDA extension."""
    import torch
    from peft.tuners.boft import layer

    plain = types.SimpleNamespace(
        apply=lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks])
    )
    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(layer, "FastBlockDiag", plain)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config", "theirs"),
    [
        (
            jaxpeft.OFT(block_size=8, bias="oft_only", targets=("query",)),
            "OFTConfig",
            {"oft_block_size": 8, "bias": "oft_only"},
        ),
        (jaxpeft.BOFT(bias="boft_only", targets=("query",)), "BOFTConfig", {"bias": "boft_only"}),
        (jaxpeft.HRA(rank=4, bias="all", targets=("query",)), "HRAConfig", {"r": 4, "bias": "all"}),
    ],
)
@pytest.mark.representatives("*OFTConfig-theirs0")
def test_trained_biases_go_both_ways_with_the_real_peft(
    reference: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: Any,
    config: str,
    theirs: Any,
) -> None:
    with_plain_blocks(monkeypatch)
    case = case_of(method, "bert", config, 0.1, target_modules=["query"], **theirs)
    assert exported(reference, tmp_path / "ours", case) < 1e-4
    gap, loaded = imported(reference, tmp_path / "theirs", case)
    assert gap < 1e-4
    assert loaded.bias == method.bias


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: jaxpeft.OFT(block_size=4, blocks=2),
            r"oft\.blocks: replaces block_size; remove one of them",
        ),
        (lambda: jaxpeft.OFT(neumann_terms=1), r"oft\.neumann_terms: one term is the identity"),
        (
            lambda: jaxpeft.OFT(block_size=2).site_block_size(site(7)),
            "oft: proj has 7 inputs, so the blocks would have size 1",
        ),
        (lambda: jaxpeft.BOFT(block_size=4, blocks=2), r"boft\.blocks: replaces block_size"),
        (
            lambda: jaxpeft.BOFT(block_size=5).site_blocks(site(32)),
            "boft: the 32 inputs of proj do not split into blocks of 5$",
        ),
        (
            lambda: jaxpeft.BOFT(block_size=4, factors=5).site_blocks(site(32)),
            "do not split into blocks of 4 of even size, 16 or a multiple of them, for 5 factors",
        ),
        (
            lambda: jaxpeft.BOFT(blocks=6, factors=2).site_blocks(site(18)),
            "do not split into 6 blocks of even size, 2 or a mul",
        ),
        (
            lambda: jaxpeft.HRA(rank=3),
            r"hra\.rank: must be even, since only pairs of reflections can start as the identity, is 3",
        ),
    ],
)
def test_what_cannot_be_is_refused(make: Any, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("version", ["0.17.1", None])
def test_the_series_of_an_earlier_peft_is_refused(version: str | None) -> None:
    config = {
        "peft_type": "OFT",
        "r": 0,
        "oft_block_size": 8,
        "target_modules": ["q_proj"],
        "peft_version": version,
    }
    with pytest.raises(
        AdapterError,
        match=(
            r"use_cayley_neumann: peft_version is .*, but the series was different before PEFT 0\.18"
        ),
    ):
        peft_config.read(config | {"use_cayley_neumann": True}, "file", {})
    method = peft_config.read(config | {"use_cayley_neumann": False}, "file", {})
    assert method == jaxpeft.OFT(block_size=8, neumann_terms=0, targets=("q_proj",))
