"""Folding adapters into the base where it is less plain: several on one site, layers that are not
adapted, tied embeddings.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from tests.conformance.conftest import moved
from tests.conformance.probing import real
from tests.core.helpers import load, run

KEY = jax.random.key(0)
SITES = ("q_proj", "down_proj")
ALONE = {
    "ia3": jaxpeft.IA3(targets=SITES, feedforward=("down_proj",)),
    "oft": jaxpeft.OFT(block_size=8, targets=SITES),
    "road": jaxpeft.RoAd(group_size=8, targets=SITES),
    "delora": jaxpeft.DeLoRA(rank=2, targets=SITES),
    "hira": jaxpeft.HiRA(rank=4, targets=SITES),
    "dora": jaxpeft.DoRA(rank=2, targets=SITES),
    "miss": jaxpeft.MiSS(rank=4, variant="bat", targets=SITES),
}
PAIRS = [pair for pair in permutations(ALONE, 2) if pair[1] in ("hira", "dora", "miss")]


def gap(model: Any, one: Any, other: Any) -> float:
    first, second = (real(run(model, params)) for params in (one, other))
    return float(np.abs(first - second).max() / max(1.0, np.abs(first).max()))


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
@pytest.mark.representatives("ia3-dora")
def test_methods_that_share_a_site_are_merged_as_they_compute(pair: tuple[str, str]) -> None:
    """HiRA, DoRA and MiSS compute with the kernel as it was, whatever another method makes of
    it.
    """
    model, base = load("llama")
    method = jaxpeft.Mixed(methods=tuple(ALONE[name] for name in pair))
    params = moved(method, jaxpeft.rewrite(method, base, KEY), size=0.1)
    assert gap(model, params, base) > 0.01
    assert gap(model, jaxpeft.merge(method, params), params) < 1e-4


@pytest.mark.parametrize("layers", [(0,), (1,)])
@pytest.mark.parametrize("name", ["dora", "oft", "shira", "vblora", "hira"])
@pytest.mark.representatives("dora-layers0")
def test_stacked_layers_with_biases_are_merged_where_some_are_not_adapted(
    name: str, layers: tuple[int, ...]
) -> None:
    more = {"rank": 2} if name in ("dora", "shira") else {}
    more |= {"vectors": 6, "vector_length": 8} if name == "vblora" else {}
    method = jaxpeft.METHODS[name](targets=("query",), layers_to_transform=layers, **more)
    model, base = load("bert", scan_layers=True)
    params = moved(method, jaxpeft.rewrite(method, base, KEY))
    assert gap(model, jaxpeft.merge(method, params), params) < 1e-4


@pytest.mark.parametrize(
    "method", [jaxpeft.LoRA(targets=("embed_tokens",)), jaxpeft.DoRA(targets=("embed_tokens",))]
)
def test_an_embedding_that_is_the_head_as_well_is_not_merged_half(method: Any) -> None:
    _, base = load("llama")
    tied = paths.build([(path, leaf) for path, leaf in paths.walk(base) if path[0] != "lm_head"])
    params = jaxpeft.rewrite(method, tied, KEY)
    said = (
        f"model/embed_tokens is tied to the language-model head, but {method.name} changes it only"
        " for token lookup"
    )
    with pytest.raises(ConfigError, match=said):
        jaxpeft.merge(method, params)
    assert jaxpeft.merge(method, params, tied=False)
    whole = jaxpeft.rewrite(method, base, KEY)
    assert jaxpeft.merge(method, whole)
    with pytest.raises(ConfigError, match="or tied=False"):
        jaxpeft.merge(method, whole, tied=True)
    tokens = jaxpeft.TrainableTokens(tokens=(1,))
    assert jaxpeft.merge(tokens, jaxpeft.rewrite(tokens, tied, KEY))  # changes both
