"""Leaves read from files: stacked, rounded, in blocks, sharded; all the same numbers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft import models
from jaxpeft.core import paths
from jaxpeft.hub.weights import leaf_sources, leaf_tensors, shards
from jaxpeft.hub.weights.safetensors_files import open_folder
from jaxpeft.models.base import ModelOptions, abstract_params
from tests.hub.helpers import assert_bit_equal, edited, shard
from tests.models.conftest import LABELS, tiny_config

SEQUENCE = "sequence_classification"


def load(folder, task=SEQUENCE, **options):
    labels = LABELS if "classification" in task else None
    return jaxpeft.load(
        folder, **({"task": task, "num_labels": labels, "dtype": jnp.float32} | options)
    )


@pytest.mark.parametrize(
    ("kind", "task"), [("llama", "causal_lm"), ("bert", SEQUENCE), ("distilbert", "encoder")]
)
def test_scanned_layers_are_the_unrolled_ones_stacked(reference, kind, task):
    folder = reference(kind, task).folder
    stacked, unrolled = load(folder, task, scan_layers=True)[1], load(folder, task)[1]
    assert_bit_equal(stacked, jaxpeft.stack_layers(unrolled))
    assert_bit_equal(jaxpeft.unstack_layers(stacked), unrolled)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_is_the_rounded_float32(reference, scan):
    folder = reference("llama", SEQUENCE).folder
    wide = load(folder, scan_layers=scan)[1]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    assert_bit_equal(load(folder, dtype=jnp.bfloat16, scan_layers=scan)[1], rounded)


def test_the_dtype_of_the_file_is_kept(reference, tmp_path):
    def halve(tensors):
        tensors.update(
            {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()}
        )

    source = reference("llama", "causal_lm").folder
    folder = edited(source, tmp_path / "m", halve)
    model, params = load(folder, "causal_lm", dtype=None)
    assert model.options.dtype == jnp.bfloat16
    assert_bit_equal(params, load(source, "causal_lm", dtype=jnp.bfloat16)[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_put_together_are_the_tensor(tmp_path, monkeypatch, transposed):
    monkeypatch.setattr(leaf_sources, "_BLOCK_BYTES", 64)
    wanted = np.random.default_rng(0).standard_normal((3, 37, 11)).astype(np.float32)
    shard(tmp_path, {"m.safetensors": {str(i): wanted[i] for i in range(3)}})
    tensors = open_folder(tmp_path)
    leaf = wanted.swapaxes(1, 2) if transposed else wanted
    source = leaf_sources.LeafSource(
        tuple(tensors[str(i)] for i in range(3)),
        leaf.shape,
        np.dtype(np.float32),
        stacks=1,
        transposed=transposed,
    )
    np.testing.assert_array_equal(source.read(None), leaf)
    index = (slice(1, 3), slice(3, 9), slice(2, 7))
    np.testing.assert_array_equal(source.read(index), leaf[index])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_sharded_read_over_8_devices_equals_the_plain_one(reference, tmp_path, scan, axis):
    sizes = {"vocab_size": 96, "num_hidden_layers": 8, "type_vocab_size": 8}
    folder = reference("bert", "encoder", **sizes).folder
    split = load_file(folder / "model.safetensors")
    names = sorted(split)
    halves = {f"m-{i}.safetensors": {name: split[name] for name in names[i::2]} for i in range(2)}
    shard(tmp_path, halves)
    config = tiny_config("bert", **sizes)
    model = models.build(
        config, ModelOptions("encoder", None, jnp.dtype(jnp.float32), scan_layers=scan)
    )
    abstract = abstract_params(model)
    plan = leaf_tensors.plan(abstract, open_folder(tmp_path), models.FAMILIES["bert"], None)
    assert plan.new == plan.replaced == ()
    mesh = Mesh(np.asarray(jax.devices()), "x")
    assert mesh.size == 8
    plain = load(folder, "encoder", scan_layers=scan)[1]
    if axis == 0:
        sharded = shards.read(abstract, plan, {}, NamedSharding(mesh, PartitionSpec("x")))
    else:
        spec = {n: NamedSharding(mesh, PartitionSpec(*[None] * (n - 1), "x")) for n in (1, 2, 3)}
        sharded = paths.build(
            [
                (
                    path,
                    jax.make_array_from_callback(
                        leaf.shape, spec[leaf.ndim], plan.sources[path].read
                    ),
                )
                for path, leaf in paths.walk(abstract)
            ]
        )
    for _, leaf in paths.walk(sharded):
        assert len({s.device for s in leaf.addressable_shards}) == 8
        assert all(s.data.size * 8 == leaf.size for s in leaf.addressable_shards)
    assert_bit_equal(sharded, plain)
