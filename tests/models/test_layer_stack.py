"""Unequal layers are scanned in their repeating pattern, and compute what unrolled ones do."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.tree import partition
from jaxpeft.models.base import abstract_params
from jaxpeft.models.layer_stack import find_runs
from jaxpeft.remat import REMAT_POLICIES
from tests.export.making import assert_close, ours
from tests.hub.helpers import assert_bit_equal, trained
from tests.inference.test_generation import MOST, PROMPTS
from tests.models.conftest import make_batch

CAUSAL = "causal_lm"


@pytest.mark.parametrize(
    ("kinds", "names"),
    [
        ("", []),
        ("a", ["0"]),
        ("aaaa", ["0:4:1"]),
        ("ab", ["0", "1"]),
        ("abab", ["0:4:2"]),
        ("ddd" + "m" * 58, ["0:3:1", "3:61:1"]),  # DeepSeek-V3
        ("d" + "m" * 46, ["0", "1:47:1"]),  # GLM-4.7-Flash
        ("lllf" * 12, ["0:48:4"]),  # Qwen3.5
        ("sssssg" * 7, ["0:42:6"]),  # Gemma 4
        ("ssssg" * 3 + "SSSSG" * 4, ["0:15:5", "15:35:5"]),  # its last layers share keys
        ("ababa", ["0:4:2", "4"]),
        ("xabababy", ["0", "1:7:2", "7"]),
        ("aaabab", ["0:2:1", "2:6:2"]),  # not three of a, and then b, a, b
        ("fslslslsl", ["0", "1:9:2"]),
        ("abcdef", ["0", "1", "2", "3", "4", "5"]),
    ],
)
def test_the_runs_of_layers(kinds: str, names: list[str]) -> None:
    runs = find_runs(kinds)
    shown = [
        paths.layers_name(run) if run.step == 1 else f"{run.start}:{run.stop}:{run.step}"
        for run in runs
    ]
    assert shown == names
    for run in runs:
        assert (run.stop - run.start) % run.step == 0
        for i in range(run.start, run.stop):
            assert kinds[i] == kinds[run.start + (i - run.start) % run.step]
    assert [i for run in runs for i in range(run.start, run.stop)] == list(range(len(kinds)))


def test_the_runs_of_many_layers_without_a_pattern_are_found_in_time() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.integers(0, 4, 3000).tolist()
    assert sum(run.stop - run.start for run in find_runs(kinds)) == 3000


@pytest.fixture(scope="module")
def several(reference: Any) -> Any:
    """A decoder whose layers have several windows and rotations, as if their leaves differed:
    `(unrolled model, its params, scanned model, its params)`.
    """
    made = reference(
        "gemma3_text",
        CAUSAL,
        num_hidden_layers=5,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
    )
    model, params = made.load()
    config = dataclasses.replace(model.config, per_layer=(model.config,) * 5)
    options = dataclasses.replace(model.options, scan_layers=True)
    scanned = model.clone(config=config, options=options)
    return model, params, scanned, jaxpeft.stack_layers(params, abstract_params(scanned))


def test_a_pattern_of_windows_and_rotations_computes_as_unrolled_layers(several: Any) -> None:
    model, params, scanned, stacked = several
    assert set(stacked["model"]["layers"]) == {"0:4:2", "1:4:2", "4"}
    assert_bit_equal(jaxpeft.unstack_layers(stacked), params)
    assert_close(ours(scanned, stacked), ours(model, params), 1e-6)


@pytest.mark.slow
def test_a_pattern_with_prefixes_computes_as_unrolled_layers(several: Any) -> None:
    model, params, scanned, stacked = several
    method = jaxpeft.PrefixTuning(num_virtual_tokens=3)
    outputs = []
    for one, base in ((model, params), (scanned, stacked)):
        adapted = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
        outputs.append(ours(one, adapted))
        assert jaxpeft.generate(one, adapted, PROMPTS, max_new_tokens=2, eos=())
    assert_close(*outputs, 1e-6)


@pytest.mark.slow
def test_a_pattern_generates_the_tokens_of_unrolled_layers(several: Any) -> None:
    model, params, scanned, stacked = several
    found, wanted = (
        jaxpeft.generate(one, base, PROMPTS, max_new_tokens=MOST, eos=())
        for one, base in ((scanned, stacked), (model, params))
    )
    assert found == wanted


@pytest.mark.parametrize("remat", REMAT_POLICIES)
@pytest.mark.representatives("products")
@pytest.mark.slow
def test_the_gradients_of_a_pattern_are_those_of_unrolled_layers(
    reference: Any, remat: str
) -> None:
    made, batch = reference("qwen3_moe", CAUSAL), make_batch("right")
    method = jaxpeft.LoRA(rank=2, targets=("q_proj", "down_proj"))
    found = []
    for scan in (False, True):
        model, base = made.load(scan_layers=scan)
        model = model.clone(options=dataclasses.replace(model.options, remat=remat))
        params = jaxpeft.rewrite(method, base, jax.random.key(0))
        params = paths.map_with_path(  # the same numbers in every layer of both
            lambda path, leaf: leaf + 0.1 if path[-1].startswith("lora_") else leaf, params
        )
        mine, rest = partition(params, trainable_mask(method, params))

        def loss(mine: Any, rest: Any, model: Any = model) -> Any:
            out = jaxpeft.apply(model, jaxpeft.combine(mine, rest), batch.ids, batch.mask)
            return jnp.mean(jnp.square(out))

        found.append(jaxpeft.unstack_layers(jax.jit(jax.grad(loss))(mine, rest)))
    for (path, own), (other, wanted) in zip(*map(paths.walk, found), strict=True):
        assert path == other
        assert_close(np.asarray(own), np.asarray(wanted), 1e-5)


def test_a_pattern_of_modernbert_repeats_after_its_first_layer(reference: Any) -> None:
    made = reference("modernbert", "encoder")
    (_, unrolled), (model, params) = (made.load(scan_layers=scan) for scan in (False, True))
    assert set(params["layers"]) == {"0", "1:5:2", "2:5:2"}
    assert_bit_equal(jaxpeft.unstack_layers(params), unrolled)
    assert_bit_equal(jaxpeft.stack_layers(unrolled, abstract_params(model)), params)
    with pytest.raises(
        ValueError, match="layers/0 and layers/1 differ at attn_norm/scale: layers with"
    ):
        jaxpeft.stack_layers(unrolled)
