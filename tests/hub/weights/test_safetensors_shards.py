"""Weights in several files, found through `model.safetensors.index.json`."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxpeft.errors import WeightsError
from jaxpeft.hub.weights.safetensors_files import INDEX, SINGLE, open_folder
from tests.hub.helpers import edit_json, shard

PICKLE = pickle.dumps({"weight": np.zeros(2)}, protocol=2)


@pytest.fixture(autouse=True)
def guard(no_unpickling):
    """No test of this file may unpickle anything."""


def problems(folder):
    with pytest.raises(WeightsError) as caught:
        open_folder(folder)
    return caught.value.problems


def test_shards_are_read_through_their_index(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {name: rng.standard_normal((4, 3)).astype(np.float32) for name in "abc"}
    shard(
        tmp_path,
        {"m-1.safetensors": {"a": tensors["a"]}, "m-2.safetensors": {k: tensors[k] for k in "bc"}},
    )
    (tmp_path / SINGLE).write_bytes(b"an older export that the index replaces")
    found = open_folder(tmp_path)
    assert {name: tensor.file.name[:3] for name, tensor in found.items()} == {
        "a": "m-1",
        "b": "m-2",
        "c": "m-2",
    }
    for name, wanted in tensors.items():
        np.testing.assert_array_equal(found[name].read_rows(0, 4), wanted)


@pytest.fixture
def shards(tmp_path):
    ones = np.ones((2, 2), np.float32)
    return shard(tmp_path, {"m-1.safetensors": {"a": ones}, "m-2.safetensors": {"b": ones}})


def test_a_shard_that_is_missing_is_refused(shards):
    (shards / "m-2.safetensors").unlink()
    assert problems(shards) == (
        f"{shards / 'm-2.safetensors'}: no such file; fetch the model again",
    )


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "/etc/passwd", "sub/evil.safetensors", ".", "evil/"]
)
def test_an_index_names_files_of_its_own_folder_only(shards, name):
    evil = shards.parent / "evil.safetensors"
    save_file({"b": np.zeros((2, 2), np.float32)}, evil)
    edit_json(shards / INDEX, lambda index: index["weight_map"].update(b=name))
    (problem,) = problems(shards)
    assert f"names {name!r}, which is not a file of this folder" in problem


@pytest.mark.parametrize("name", ["..", ""])
def test_an_index_that_names_a_folder_is_refused(shards, name):
    edit_json(shards / INDEX, lambda index: index["weight_map"].update(b=name))
    assert problems(shards)[0].endswith("no such file; fetch the model again")


def test_a_tensor_in_two_shards_is_refused(shards):
    save_file({name: np.zeros((2, 2), np.float32) for name in "ab"}, shards / "m-2.safetensors")
    assert problems(shards) == ("a: is in both m-1.safetensors and m-2.safetensors",)


def test_a_tensor_that_its_shard_does_not_hold_is_refused(shards):
    edit_json(shards / INDEX, lambda index: index["weight_map"].update(c="m-1.safetensors"))
    assert problems(shards) == (f"c: {INDEX} says that it is in m-1.safetensors, but it is not",)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}'])
def test_an_index_without_a_map_is_refused(shards, content):
    (shards / INDEX).write_text(content)
    assert problems(shards) == (f"{shards / INDEX}: has no weight_map",)


def test_an_index_that_is_not_json_is_refused(shards):
    (shards / INDEX).write_bytes(PICKLE)
    assert f"{INDEX}: not UTF-8 text" in problems(shards)[0] or "not JSON" in problems(shards)[0]


def test_the_problems_of_all_shards_come_at_once(shards):
    (shards / "m-1.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (shards / "m-2.safetensors").write_bytes(PICKLE)
    more = {"c": "m-3.safetensors", "d": "../evil.safetensors"}
    (shards / INDEX).write_text(
        json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors", **more}})
    )
    found = "\n".join(problems(shards))
    assert len(problems(shards)) == 4
    for part in (
        "LFS pointer",
        "pickle or zip",
        "m-3.safetensors: no such file",
        "names '../evil.safetensors'",
    ):
        assert part in found
