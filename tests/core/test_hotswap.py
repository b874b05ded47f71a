"""Adapters padded to one rank: they compute what they did, in a program compiled once."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.inference import decoding
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, load

LINEAR = ("q_proj", "down_proj")
PADDED: dict[str, Any] = {
    "lora": lambda rank: jaxpeft.LoRA(rank=rank, alpha=3.0 + rank, targets=LINEAR),
    "lora pattern": lambda rank: jaxpeft.LoRA(
        rank=rank, rank_pattern={"q_proj": rank + 1}, targets=LINEAR
    ),
    "lora pissa": lambda rank: jaxpeft.LoRA(rank=rank, init_weights="pissa", targets=LINEAR),
    "lora rslora bias": lambda rank: jaxpeft.LoRA(
        rank=rank, rslora=True, lora_bias=True, targets=LINEAR
    ),
    "dora": lambda rank: jaxpeft.DoRA(rank=rank, alpha=3.0 + rank, targets=LINEAR),
    "lora_fa": lambda rank: jaxpeft.LoRAFA(rank=rank, targets=LINEAR),
    "adalora": lambda rank: jaxpeft.AdaLoRA(
        rank=rank, target_rank=1, final_steps=1, targets=LINEAR
    ),
    "loha": lambda rank: jaxpeft.LoHa(rank=rank, targets=LINEAR),
    "delora": lambda rank: jaxpeft.DeLoRA(rank=rank, boundary=2.0, targets=LINEAR),
}


def adapter(method: Any, base: Any, seed: int) -> Any:
    return moved(method, jaxpeft.rewrite(method, base, jax.random.key(seed)), seed=seed)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("name", list(PADDED))
@pytest.mark.representatives("lora-scanned", "dora-scanned")
def test_padded_adapters_compute_the_same_in_one_program(name: str, scan: bool) -> None:
    model, base = load("llama", scan_layers=scan)
    run = jax.jit(lambda params: jaxpeft.apply(model, params, BATCH.ids, BATCH.mask))
    for seed, rank in enumerate((2, 4)):
        method = PADDED[name](rank)
        params = adapter(method, base, seed)
        before = run._cache_size()
        alone = np.asarray(jaxpeft.apply(model, params, BATCH.ids, BATCH.mask))
        assert run._cache_size() == before
        padded = run(jaxpeft.pad_rank(method, params, 6))
        np.testing.assert_allclose(padded, alone, atol=2e-5 * np.abs(alone).max())
    assert run._cache_size() == 1


def test_generating_with_another_padded_adapter_compiles_nothing() -> None:
    model, base = load("llama", scan_layers=True)
    prompts = [[5, 9, 11], [7, 3]]
    written = []
    for seed, rank in enumerate((2, 4)):
        method = jaxpeft.LoRA(rank=rank, alpha=8.0, targets=LINEAR)
        params = adapter(method, base, seed)
        padded = jaxpeft.pad_rank(method, params, 4)
        sizes = [program._cache_size() for program in decoding.programs(None)]
        written.append(jaxpeft.generate(model, padded, prompts, max_new_tokens=4))
        new = [program._cache_size() for program in decoding.programs(None)]
        assert seed == 0 or new == sizes
        alone = jaxpeft.generate(model, params, prompts, max_new_tokens=4)
        assert alone == written[-1]
    assert written[0] != written[1]


def test_another_base_leaf_is_the_same_array() -> None:
    _, base = load("llama")
    method = jaxpeft.LoRA(rank=2, targets=LINEAR)
    params = adapter(method, base, 0)
    padded = jaxpeft.pad_rank(method, params, 4)
    site = "model", "layers", "0", "self_attn", "q_proj"
    one, other = params, padded
    for key in site:
        one, other = one[key], other[key]
    assert other["kernel"] is one["kernel"]
    assert (one["lora_a"].shape[1], other["lora_a"].shape[1]) == (2, 4)


@pytest.mark.parametrize(
    ("method", "given", "rank", "text"),
    [
        (
            "lora",
            4,
            3,
            r"q_proj/lora_a has the shape \[32, 4\], of a rank above 3; pad to the high",
        ),
        ("lora", 4, 0, "rank must be a whole number of at least 1, is 0"),
        ("lora", 4, True, "rank must be a whole number of at least 1, is True"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(method: str, given: int, rank: Any, text: str) -> None:
    _, base = load("llama")
    made = jaxpeft.LoRA(rank=given, targets=("q_proj",))
    with pytest.raises(ConfigError, match=text):
        jaxpeft.pad_rank(made, jaxpeft.rewrite(made, base, jax.random.key(0)), rank)


def test_methods_and_trees_that_cannot_be_padded_are_refused() -> None:
    _, base = load("llama")
    vera = jaxpeft.VeRA(rank=4, targets=("q_proj",))
    tree = jaxpeft.rewrite(vera, base, jax.random.key(0))
    with pytest.raises(ConfigError, match="adapters of vera cannot be padded to another rank"):
        jaxpeft.pad_rank(vera, tree, 8)
    lora = jaxpeft.LoRA(rank=4, targets=("q_proj",))
    tree = jaxpeft.rewrite(lora, base, jax.random.key(0))
    other = jaxpeft.LoRA(rank=4, targets=("q_proj", "v_proj"))
    with pytest.raises(ConfigError, match="v_proj/lora_a is a leaf of the method only; give the"):
        jaxpeft.pad_rank(other, tree, 8)
