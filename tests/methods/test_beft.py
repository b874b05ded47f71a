"""BEFT: its default sites, and modules without a bias."""

from __future__ import annotations

import jax
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from tests.core.helpers import load


@pytest.mark.parametrize(("kind", "name"), [("llama", "v_proj"), ("bert", "value")])
def test_it_adapts_value_projections_by_default(kind: str, name: str) -> None:
    params = jaxpeft.rewrite(jaxpeft.BEFT(), load(kind)[1], jax.random.key(0))
    adapted = {path[-2] for path, _ in paths.walk(params) if path[-1] == "beft_bias"}
    assert adapted == {name}


def test_it_cannot_be_merged_into_a_module_without_a_bias() -> None:
    method = jaxpeft.BEFT()
    params = jaxpeft.rewrite(method, load("llama")[1], jax.random.key(0))
    with pytest.raises(
        ConfigError,
        match=r"v_proj: merging beft needs a bias, but the module has none; keep the adapter",
    ):
        jaxpeft.merge(method, params)
