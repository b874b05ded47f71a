"""Paths walk and build trees, and mirror the names of Hugging Face."""

from __future__ import annotations

import numpy as np
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
    ("path", "axes"),
    [
        ("model/layers/self_attn/q_proj/kernel", (1,)),
        ("model/layers/3/self_attn/q_proj/kernel", ()),
        ("model/layers/mlp/experts/up_proj/kernel", (1, 3)),
        ("model/layers/3/mlp/experts/up_proj/kernel", (4,)),
        ("model/layers/3:9:2/self_attn/q_proj/kernel", (1,)),
        ("model/layers/3:9:2/mlp/experts/up_proj/kernel", (1, 4)),
        ("bert/encoder/layer/output/dense/kernel", (2,)),
        ("bert/encoder/layer/11/output/dense/kernel", ()),
        ("transformer/h/attn/kernel", (1,)),
        ("blocks/kernel", (0,)),
        ("model/embed_tokens/embedding", ()),
        ("layers", ()),
        ("model/layers", ()),
        ("mlp/layers_of_mine/kernel", ()),
    ],
)
def test_the_stacked_axes_of_a_path(path, axes):
    assert paths.stacks(tuple(path.split("/"))) == axes


@pytest.mark.parametrize(
    ("path", "sizes", "names"),
    [
        (
            "model/layers/self_attn/q_proj",
            (2,),
            ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"),
        ),
        ("model/layers/self_attn/q_proj/kernel", (1,), ("model.layers.0.self_attn.q_proj.weight",)),
        ("model/layers/1/mlp/up_proj/kernel", (), ("model.layers.1.mlp.up_proj.weight",)),
        (
            "bert/encoder/layer/output/LayerNorm/scale",
            (2,),
            (
                "bert.encoder.layer.0.output.LayerNorm.weight",
                "bert.encoder.layer.1.output.LayerNorm.weight",
            ),
        ),
        (
            "model/layers/mlp/experts/up_proj/kernel",
            (2, 2),
            (
                "model.layers.0.mlp.experts.0.up_proj.weight",
                "model.layers.0.mlp.experts.1.up_proj.weight",
                "model.layers.1.mlp.experts.0.up_proj.weight",
                "model.layers.1.mlp.experts.1.up_proj.weight",
            ),
        ),
        (
            "model/layers/7/mlp/experts/up_proj",
            (2,),
            ("model.layers.7.mlp.experts.0.up_proj", "model.layers.7.mlp.experts.1.up_proj"),
        ),
        (
            "model/layers/3:9:2/self_attn/q_proj/kernel",
            (3,),
            tuple(f"model.layers.{i}.self_attn.q_proj.weight" for i in (3, 5, 7)),
        ),
        (
            "model/layers/0:4:2/mlp/experts/up_proj",
            (2, 2),
            (
                "model.layers.0.mlp.experts.0.up_proj",
                "model.layers.0.mlp.experts.1.up_proj",
                "model.layers.2.mlp.experts.0.up_proj",
                "model.layers.2.mlp.experts.1.up_proj",
            ),
        ),
        ("model/embed_tokens/embedding", (), ("model.embed_tokens.weight",)),
        ("model/embed_tokens/embedding", (2,), ("model.embed_tokens.weight",)),
        ("classifier/bias", (), ("classifier.bias",)),
    ],
)
def test_hf_names(path, sizes, names):
    assert paths.hf_names(tuple(path.split("/")), sizes) == names


@pytest.mark.parametrize(
    ("name", "layers"),
    [("3", range(3, 4)), ("3:9:2", range(3, 9, 2)), ("0:4:1", range(4))],
)
def test_the_names_of_layers(name, layers):
    assert paths.named_layers(name) == layers
    assert paths.layers_name(layers) == name


@pytest.mark.parametrize("name", ["self_attn", ":", "3:9", "3:9:0", "3:9:2:1", "-1", "", "\u00b2"])
def test_what_names_no_layers(name):
    assert paths.named_layers(name) is None


@pytest.mark.parametrize(
    ("path", "within", "count"),
    [
        ("model/layers/3/norm/scale", ("3", "norm/scale"), 1),
        ("model/layers/3:9:2/norm/scale", ("3:9:2", "norm/scale"), 5),
        ("model/layers/norm/scale", (":", "norm/scale"), 5),
        ("model/norm/scale", None, 1),
    ],
)
def test_a_path_within_its_layer(path, within, count):
    steps = tuple(path.split("/"))
    found = paths.within_layer(steps)
    assert (found and (found[0], paths.text(found[1]))) == within
    assert paths.layer_count(steps, np.zeros(5)) == count


def test_named_items_index_the_leaf():
    path = ("model", "layers", "mlp", "experts", "up_proj", "kernel")
    found = paths.named_items(path, np.zeros((2, 3, 4, 5)))
    assert found[4] == ("model.layers.1.mlp.experts.1.up_proj.weight", (1, 1))
    assert len(found) == 6
    assert paths.named_items(("lm_head", "kernel"), np.zeros((4, 5))) == [("lm_head.weight", ())]


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
    one_by_one = {name for path, _ in paths.walk(unrolled) for name in paths.hf_names(path)}
    together = {name for path, _ in paths.walk(stacked) for name in paths.hf_names(path, (2,))}
    assert together == one_by_one
    assert len(together) > len(list(paths.walk(stacked)))
