"""Paths walk and build trees, and mirror the names of Hugging Face."""

from __future__ import annotations

import pytest

from jaxpeft.core import paths
from tests.core.helpers import load

TREE = {"b": {"y": 1, "x": 2}, "a": 3}


def test_walk_follows_the_order_of_the_keys():
    assert list(paths.walk(TREE)) == [(("b", "y"), 1), (("b", "x"), 2), (("a",), 3)]


def test_build_is_the_inverse_of_walk_and_shares_no_dict():
    built = paths.build(list(paths.walk(TREE)))
    assert built == TREE
    assert list(built) == list(TREE)
    built["b"]["x"] = 9
    assert TREE["b"]["x"] == 2


def test_build_takes_an_iterator():
    assert paths.build(paths.walk(TREE)) == TREE


def test_map_with_path_gives_path_and_leaf():
    assert paths.map_with_path(lambda path, leaf: (paths.text(path), leaf), TREE) == {
        "b": {"y": ("b/y", 1), "x": ("b/x", 2)},
        "a": ("a", 3),
    }


def test_get_finds_nodes_and_leaves():
    assert paths.get(TREE, ("b",)) is TREE["b"]
    assert paths.get(TREE, ("b", "x")) == 2
    assert paths.get(TREE, ()) is TREE
    with pytest.raises(KeyError, match="z"):
        paths.get(TREE, ("b", "z"))


@pytest.mark.parametrize(
    ("path", "axis"),
    [
        ("model/layers/self_attn/q_proj/kernel", 1),
        ("model/layers/3/self_attn/q_proj/kernel", None),
        ("bert/encoder/layer/output/dense/kernel", 2),
        ("bert/encoder/layer/11/output/dense/kernel", None),
        ("transformer/h/attn/kernel", 1),
        ("blocks/kernel", 0),
        ("model/embed_tokens/embedding", None),
        ("layers", None),
        ("model/layers", None),
        ("mlp/layers_of_mine/kernel", None),
    ],
)
def test_layer_axis(path, axis):
    assert paths.layer_axis(tuple(path.split("/"))) == axis


@pytest.mark.parametrize(
    ("path", "layers", "names"),
    [
        (
            "model/layers/self_attn/q_proj",
            2,
            ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ),
        ("model/layers/self_attn/q_proj/kernel", 1, ("model.layers.0.self_attn.q_proj.weight",)),
        ("model/layers/1/mlp/up_proj/kernel", None, ("model.layers.1.mlp.up_proj.weight",)),
        (
            "bert/encoder/layer/output/LayerNorm/scale",
            2,
            (
                "bert.encoder.layer.0.output.LayerNorm.weight",
                "bert.encoder.layer.1.output.LayerNorm.weight",
            ),
        ),
        ("model/embed_tokens/embedding", None, ("model.embed_tokens.weight",)),
        ("model/embed_tokens/embedding", 2, ("model.embed_tokens.weight",)),
        ("classifier/bias", None, ("classifier.bias",)),
    ],
)
def test_hf_names(path, layers, names):
    assert paths.hf_names(tuple(path.split("/")), layers) == names


@pytest.mark.parametrize(
    ("path", "head"),
    [
        ("classifier/kernel", True),
        ("score/kernel", True),
        ("pre_classifier/bias", True),
        ("classifier/dense", True),
        ("lm_head/kernel", False),
        ("bert/pooler/dense/kernel", False),
        ("bert/classifier/kernel", False),
    ],
)
def test_a_head_is_what_stands_beside_the_backbone(path, head):
    assert paths.is_head(tuple(path.split("/"))) is head


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_the_stacked_names_are_the_unrolled_names(kind):
    _, unrolled = load(kind)
    _, stacked = load(kind, scan_layers=True)
    one_by_one = {name for path, _ in paths.walk(unrolled) for name in paths.hf_names(path, None)}
    together = {name for path, _ in paths.walk(stacked) for name in paths.hf_names(path, 2)}
    assert together == one_by_one
    assert len(together) > len(list(paths.walk(stacked)))
