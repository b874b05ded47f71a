"""Merging into a quantized base."""

from __future__ import annotations

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from jaxpeft.kernels import QUANTIZED
from tests.core.helpers import load, run

# the tiny model has inputs of 48 numbers, which the blocks of some forms do not divide
FITTING = [name for name, form in QUANTIZED.items() if 48 % form.multiple == 0]
every_form = pytest.mark.parametrize("form", FITTING)
both = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


def rewritten(form: str | None, scan: bool) -> tuple[Any, Any, Any]:
    model, base = load("llama", scan_layers=scan)
    method = jaxpeft.LoRA(rank=2, targets="all-linear")
    params = jaxpeft.rewrite(
        method, jaxpeft.quantize(base, form) if form else base, jax.random.key(0)
    )
    moved = paths.map_with_path(
        lambda path, leaf: leaf + 0.05 if path[-1] == "lora_b" else leaf, params
    )
    return model, method, moved


@both
@every_form
@pytest.mark.representatives("int8-unrolled")
def test_the_merged_base_computes_what_base_and_adapter_did(
    form: str, scan: bool, caplog: Any
) -> None:
    model, method, params = rewritten(form, scan)
    with caplog.at_level(logging.INFO, "jaxpeft"):
        merged, errors = jaxpeft.merge_quantized(method, params, dtype=jnp.float32)
    names = {path[-1] for path, _ in paths.walk(merged)}
    assert not names & {
        *(leaf for one in QUANTIZED.values() for leaf in one.leaves),
        "lora_a",
        "lora_b",
    }
    np.testing.assert_allclose(run(model, merged), run(model, params), atol=2e-5)
    assert len(errors) == 14 and set(errors.values()) == {0.0}
    assert "merged into float32: 14 kernels, median relative error 0.00e+00" in caplog.text


@pytest.mark.slow
@both
@every_form
def test_what_is_lost_is_said(form: str, scan: bool) -> None:
    _, method, params = rewritten(form, scan)
    whole, _ = jaxpeft.merge_quantized(method, params, dtype=jnp.float32)
    narrow, errors = jaxpeft.merge_quantized(method, params)
    assert narrow["model"]["layers"]["self_attn" if scan else "0"] is not None
    assert min(errors.values()) > 1e-4 and max(errors.values()) < 4e-3
    again, errors = jaxpeft.merge_quantized(method, params, form)
    decoded = dict(paths.walk(jaxpeft.dequantize(again)))
    of = {"int8": (1e-4, 0.02), "fp8": (0.01, 0.04), "int4": (0.03, 0.2), "nf4": (0.03, 0.2)}[form]
    for path, leaf in paths.walk(whole):
        if path[-2:] in (("q_proj", "kernel"), ("down_proj", "kernel")):
            layers = range(leaf.shape[0]) if scan else [None]
            for i in layers:
                exact, found = (np.asarray(a if i is None else a[i]) for a in (leaf, decoded[path]))
                names = [
                    name
                    for name in errors
                    if name.endswith(path[-2])
                    and (f".{i}." in name if scan else f".{path[2]}." in name)
                ]
                own = np.linalg.norm(found - exact) / np.linalg.norm(exact)
                assert errors[names[0]] == pytest.approx(own, rel=1e-4) and of[0] < own < of[1]


def test_only_what_was_quantized_changes_its_dtype() -> None:
    _, base = load("llama", scan_layers=False)
    method = jaxpeft.LoRA(rank=2, targets=("q_proj", "k_proj"))
    held = jaxpeft.quantize(base, jaxpeft.Quant("int8", targets=("q_proj",)))
    merged, errors = jaxpeft.merge_quantized(
        method, jaxpeft.rewrite(method, held, jax.random.key(0))
    )
    kinds = {path[-2:]: leaf.dtype for path, leaf in paths.walk(merged)}
    assert kinds["q_proj", "kernel"] == jnp.bfloat16 and kinds["k_proj", "kernel"] == jnp.float32
    assert {name.rpartition(".")[2] for name in errors} == {"q_proj"}
    assert jax.tree.structure(merged) == jax.tree.structure(base)


def test_a_plain_base_is_for_merge() -> None:
    _, method, params = rewritten(None, scan=False)
    with pytest.raises(
        ConfigError, match=r"no kernel of the base is quantized; use jaxpeft\.merge"
    ):
        jaxpeft.merge_quantized(method, params)
