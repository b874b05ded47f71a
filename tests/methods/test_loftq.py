"""LoftQ's start: the adapted quantized model is nearer to the model of the files than the quantized
one.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import chosen_sites, kernel_of, layer_of
from jaxpeft.errors import ConfigError
from jaxpeft.train.data_start import Start
from tests.conformance.probing import quantized, real
from tests.core.helpers import BATCH, load
from tests.models.conftest import forward, reference  # noqa: F401 - a fixture

KEY = jax.random.key(0)


def started(method: Any, model: Any, base: Any) -> Any:
    return method.start(jaxpeft.rewrite(method, base, KEY), Start(model, base, KEY))


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["lora", "lora_fa"])
@pytest.mark.representatives("lora-True")
def test_a_and_b_begin_as_the_largest_part_of_what_the_base_lost(
    reference: Any, scan: bool, name: str
) -> None:
    model, original = reference("llama", "causal_lm").load(scan_layers=scan)
    stored, _ = quantized(original)
    method = jaxpeft.METHODS[name](
        rank=8, alpha=8.0, rank_pattern={"q_proj": 2}, init_weights="loftq"
    )
    begun, params = started(method, model, stored)
    assert begun.init_weights == "default"
    assert begun.rank_pattern == method.rank_pattern
    seen = 0
    for site, on in chosen_sites(method, stored).items():
        for i, called in enumerate(site.names):
            if not on[i]:
                continue
            wanted = np.asarray(kernel_of(site, paths.get(original, site.path), i))
            kernel = np.asarray(kernel_of(site, paths.get(stored, site.path), i))
            own = layer_of(site, paths.get(params, site.path), i)
            whole = begun.fold(own, {"kernel": kernel})["kernel"]
            left = np.linalg.svd(wanted - kernel, compute_uv=False)[method.site_rank(called) :]
            np.testing.assert_allclose(
                np.linalg.norm(wanted - whole), np.linalg.norm(left), rtol=1e-3
            )
            seen += 1
    assert seen == 14

    def logits(tree: Any) -> Any:
        return real(np.asarray(forward(model, tree, BATCH.ids, BATCH.mask)))

    before, after = (np.linalg.norm(logits(tree) - logits(original)) for tree in (stored, params))
    assert after < 0.9 * before


@pytest.mark.slow
def test_a_site_that_is_not_quantized_starts_as_lora_does(reference: Any) -> None:
    model, original = reference("llama", "causal_lm").load()
    method = jaxpeft.LoRA(rank=2, init_weights="loftq", targets=("q_proj", "embed_tokens"))
    _, params = started(method, model, quantized(original)[0])
    plain = jaxpeft.rewrite(jaxpeft.LoRA(rank=2, targets=("embed_tokens",)), original, KEY)
    found, wanted = (tree["model"]["embed_tokens"]["lora_b"] for tree in (params, plain))
    np.testing.assert_array_equal(found, wanted)


def test_it_is_refused_where_it_would_do_nothing(reference: Any) -> None:
    model, base = reference("llama", "causal_lm").load()
    method = jaxpeft.LoRA(rank=2, init_weights="loftq")
    with pytest.raises(
        ConfigError, match="no adapted kernel is quantized; choose another initialization"
    ):
        started(method, model, base)
    made, base = load("llama")
    with pytest.raises(
        ConfigError, match="the model was not loaded from files, so its original kernels"
    ):
        started(method, made, base)
    with pytest.raises(
        ConfigError,
        match="init_weights: 'loftq' would not match the kernels' magnitudes",
    ):
        jaxpeft.DoRA(init_weights="loftq")
