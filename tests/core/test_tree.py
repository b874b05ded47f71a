"""Partition and combine are inverse, as are stacking and unrolling layers; what does not fit is
refused by its path.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxpeft
from jaxpeft.core import paths, tree
from tests.core.helpers import assert_bits, load

KEYS = st.sampled_from("abcde")
TREES = st.recursive(
    st.integers(0, 99), lambda inner: st.dictionaries(KEYS, inner, min_size=1, max_size=3)
).filter(lambda node: isinstance(node, dict))
PARAMS = {"a": {"kernel": 1, "bias": 2}, "b": {"kernel": 3}, "c": 4}
MASK = {"a": {"kernel": False, "bias": True}, "b": {"kernel": False}, "c": True}


def test_partition_splits_by_the_mask_and_keeps_no_empty_dict():
    trainable, frozen = tree.partition(PARAMS, MASK)
    assert trainable == {"a": {"bias": 2}, "c": 4}
    assert frozen == {"a": {"kernel": 1}, "b": {"kernel": 3}}


@settings(max_examples=60, deadline=None)
@given(TREES, st.randoms(use_true_random=False))
def test_combine_is_the_inverse_of_partition_either_way_round(params, random):
    mask = paths.map_with_path(lambda path, leaf: random.random() < 0.5, params)
    trainable, frozen = tree.partition(params, mask)
    assert len(list(paths.walk(trainable))) == sum(flag for _, flag in paths.walk(mask))
    assert tree.combine(trainable, frozen) == params
    assert tree.combine(frozen, trainable) == params


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (
            {"a": {"kernel": True, "bias": True}, "b": {"kernel": True}},
            r"different leaves \(1\): c; make the mask",
        ),
        ({**MASK, "d": True}, r"different leaves \(1\): d"),
        ({**MASK, "b": {"bias": True}}, r"different leaves \(2\): b/bias, b/kernel"),
        ({**MASK, "b": True}, r"different leaves \(2\): b, b/kernel"),
        ({}, r"different leaves \(4\): a/bias, a/kernel, b/kernel, c"),
    ],
    ids=["too few", "too many", "renamed", "a leaf for a module", "empty"],
)
def test_partition_refuses_a_mask_of_another_structure(mask, text):
    with pytest.raises(ValueError, match=text):
        tree.partition(PARAMS, mask)


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ({"a": {"k": 1}}, {"a": {"k": 2}}, "^a/k is in both trees"),
        ({"a": {"k": 1}}, {"a": 2}, "^a is in both trees"),
        ({"a": 1}, {"a": {"k": 2}}, "^a is in both trees"),
        ({"x": {"a": {"k": 1}}}, {"x": {"b": 1, "a": {"k": 1}}}, "^x/a/k is in both trees"),
    ],
    ids=["leaf", "leaf for module", "module for leaf", "deep"],
)
def test_combine_refuses_a_leaf_that_is_in_both(a, b, text):
    with pytest.raises(ValueError, match=text):
        tree.combine(a, b)


def test_the_parts_share_no_dict_with_the_whole():
    a, b = {"m": {"x": 1}}, {"n": {"y": {"z": 2}}}
    whole = tree.combine(a, b)
    whole["m"]["x"], whole["n"]["y"]["z"] = 8, 9
    assert (a, b) == ({"m": {"x": 1}}, {"n": {"y": {"z": 2}}})


def test_partition_and_combine_trace_and_keep_the_arrays():
    _, params = load("bert")
    mask = paths.map_with_path(lambda path, leaf: path[-1] == "bias", params)
    trainable, frozen = tree.partition(params, mask)
    for path, leaf in paths.walk(tree.combine(trainable, frozen)):
        assert leaf is paths.get(params, path)
    assert_bits(jax.jit(tree.combine)(trainable, frozen), params)


def test_count_takes_abstract_leaves():
    shapes = {
        "a": jax.ShapeDtypeStruct((3, 4), jnp.float32),
        "b": {"c": jax.ShapeDtypeStruct((), jnp.int32)},
    }
    assert tree.count(shapes) == 13
    assert tree.count({"a": jnp.zeros((3, 4)), "b": {"c": jnp.zeros((5,))}}) == 17
    assert tree.count({}) == 0


# ------------------------------------------------------------------------------------------- layers


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_unstack_is_the_inverse_of_stack(kind, dtype):
    _, params = load(kind, dtype=dtype)
    stacked = tree.stack_layers(params)
    assert not any(part.isdigit() for path, _ in paths.walk(stacked) for part in path)
    assert tree.count(stacked) == tree.count(params)
    assert_bits(tree.unstack_layers(stacked), params)
    assert_bits(tree.stack_layers(tree.unstack_layers(stacked)), stacked)


def test_more_than_ten_layers_keep_their_order():
    params = {"layers": {str(i): {"kernel": jnp.full((2,), i)} for i in sorted(range(12), key=str)}}
    stacked = jaxpeft.stack_layers(params)
    assert stacked["layers"]["kernel"][:, 0].tolist() == list(range(12))
    assert int(jaxpeft.unstack_layers(stacked)["layers"]["10"]["kernel"][1]) == 10


def test_stack_leaves_what_is_stacked_already():
    _, params = load("llama", scan_layers=True)
    assert_bits(tree.stack_layers(params), params)


def test_unstack_leaves_what_is_unrolled_already():
    _, params = load("llama")
    assert_bits(tree.unstack_layers(params), params)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda layer: layer.update(extra=jnp.zeros(2)), "layers/0 and layers/1 differ at extra"),
        (lambda layer: layer["mlp"].pop("kernel"), "layers/0 and layers/1 differ at mlp/kernel"),
        (
            lambda layer: layer["mlp"].update(kernel=jnp.zeros((3, 2))),
            "layers/0 and layers/1 differ at mlp/kernel",
        ),
        (
            lambda layer: layer["mlp"].update(lora_a=jnp.zeros((3, 2))),
            "mlp/lora_a: layers with different leaves",
        ),
    ],
    ids=["too many", "too few", "shape", "an adapter in one layer"],
)
def test_layers_that_differ_cannot_be_stacked(change, text):
    layers = {
        str(i): {"mlp": {"kernel": jnp.zeros((2, 2))}, "norm": jnp.zeros(2)} for i in range(2)
    }
    change(layers["1"])
    with pytest.raises(ValueError, match=text):
        tree.stack_layers({"model": {"layers": layers}})
