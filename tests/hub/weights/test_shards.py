"""Leaves read into their shards: the numbers of a plain load, and no more bytes than the shards
have.
"""

from __future__ import annotations

import re
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub.loading import outline
from jaxpeft.hub.weights import leaf_sources
from jaxpeft.hub.weights.leaf_sources import ExtendedTensor, LeafSource
from jaxpeft.hub.weights.safetensors_files import Meter, open_folder
from jaxpeft.kernels import QUANTIZED
from tests.hub.helpers import assert_bit_equal, edited, shard
from tests.hub.weights.spreading import WAYS, mesh_of, places, requested
from tests.representatives import both_stacks

each_way = pytest.mark.parametrize("way", WAYS)
SIZES = {"vocab_size": 96, "num_hidden_layers": 8}
WIDE = {"vocab_size": 96, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4}
"""With blocks of NF4 that keep to rows."""
ODD = {
    "vocab_size": 99,
    "hidden_size": 60,
    "intermediate_size": 45,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}
"""With parts of 33, 20 and 15, over three devices."""


PADDED = ODD | {"intermediate_size": 54}
"""With a last block of NF4 that is not full."""


def outlined(folder: FilePath, task: Any = "causal_lm", **options: Any) -> Any:
    return outline(folder, requested(task, **options))


def spread(folder: FilePath, shape: tuple[int, int], way: str, **options: Any) -> tuple[Any, Any]:
    """Load a model spread over a mesh; return its outline too."""
    found = outlined(folder, **options)
    return found, found.read(0, places(found.leaves, mesh_of(shape), way), cache=False)


def size_of(params: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params))


@both_stacks
@each_way
@pytest.mark.parametrize(
    ("sizes", "shape"), [(SIZES, (4, 2)), (SIZES, (2, 4)), (ODD, (3, 1))], ids=["4x2", "2x4", "odd"]
)
@pytest.mark.representatives(
    "4x2-both-*",
    "odd-rows-unrolled",
    "odd-layers-scanned",
    "2x4-columns-scanned",
    "2x4-whole-unrolled",
)
def test_every_leaf_is_that_of_a_plain_load_and_each_byte_is_read_once(
    reference: Any, way: str, scan: bool, sizes: Any, shape: Any
) -> None:
    folder = reference("llama", "causal_lm", **sizes).folder
    _, plain = jaxpeft.load(folder, task="causal_lm", scan_layers=scan)
    found, params = spread(folder, shape, way, scan_layers=scan)
    wanted = places(found.leaves, mesh_of(shape), way)
    assert all(leaf.sharding == wanted(path) for path, leaf in paths.walk(params))
    held = [leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(params)]
    assert min(held) <= (1 if way == "whole" else 1 / min(shape[0], 3))
    assert_bit_equal(params, plain)
    assert found.meter.bytes == size_of(plain)  # whatever the number of devices that hold a shard


@both_stacks
@pytest.mark.parametrize("way", ["columns", "both"])
def test_bfloat16_is_rounded_part_by_part(reference: Any, way: str, scan: bool) -> None:
    folder = reference("llama", "causal_lm", **SIZES).folder
    _, plain = jaxpeft.load(folder, task="causal_lm", scan_layers=scan, dtype=jnp.bfloat16)
    found, params = spread(folder, (4, 2), way, scan_layers=scan, dtype=jnp.bfloat16)
    assert_bit_equal(params, plain)
    assert found.meter.bytes == 2 * size_of(plain)


PART = [
    (slice(None), slice(4, 8)),
    (slice(5, 10), slice(None)),
    (slice(5, 6), slice(2, 9)),
    (slice(0, 0), slice(2, 9)),
    (slice(None), slice(3, 4)),
]


@pytest.mark.parametrize("part", PART, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("block", [64, 1 << 20])
def test_of_a_part_no_more_is_asked_than_it_has(
    tmp_path: FilePath,
    monkeypatch: pytest.MonkeyPatch,
    part: Any,
    transposed: bool,
    dtype: Any,
    block: int,
) -> None:
    monkeypatch.setattr(leaf_sources, "_BLOCK_BYTES", block)
    wanted = np.random.default_rng(0).standard_normal((3, 37, 11)).astype(dtype)
    shard(
        tmp_path,
        {
            "m.safetensors": {
                "before": np.zeros(5, np.int8),
                **{str(i): wanted[i] for i in range(3)},
            }
        },
    )
    meter = Meter()
    tensors = open_folder(tmp_path, meter)
    leaf = wanted.swapaxes(1, 2) if transposed else wanted
    source = LeafSource(
        tuple(tensors[str(i)] for i in range(3)),
        leaf.shape,
        np.dtype(dtype),
        stacks=1,
        transposed=transposed,
    )
    index = (slice(1, 3), *(part[::-1] if transposed else part))
    found = source.read(index)
    assert found.tobytes() == np.ascontiguousarray(leaf[index]).tobytes()
    assert meter.bytes == leaf[index].nbytes
    np.testing.assert_array_equal(source.read_layer(2, index[1:]), leaf[(2, *index[1:])])


def test_a_tensor_of_three_axes_is_cut_along_any(tmp_path: FilePath) -> None:
    wanted = np.random.default_rng(0).standard_normal((7, 6, 5)).astype(np.float32)
    shard(tmp_path, {"m.safetensors": {"x": wanted}})
    source = leaf_sources.join([open_folder(tmp_path)["x"]], ())
    for index in [(slice(2, 5), slice(1, 4), slice(0, 2)), (slice(None), slice(None), slice(3, 5))]:
        np.testing.assert_array_equal(source.read(index), wanted[index])


def test_a_file_that_is_cut_short_meanwhile_is_named_and_ends_nothing(
    reference: Any, tmp_path: FilePath
) -> None:
    folder = edited(reference("llama", "causal_lm", **SIZES).folder, tmp_path / "m")
    found = outlined(folder)
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    for way in ("rows", "columns"):
        with pytest.raises(
            WeightsError,
            match=r"model\.safetensors: ends at byte 20000, inside a tensor; fetch it again",
        ):
            found.read(0, places(found.leaves, mesh_of((4, 2)), way))


def test_a_sharding_that_does_not_fit_is_refused_with_its_leaf(reference: Any) -> None:
    found = outlined(reference("llama", "causal_lm").folder)
    by_three = NamedSharding(mesh_of((3, 1)), PartitionSpec("a"))
    text = (
        "sharding: model/norm/scale with shape [32] is not evenly divisible by ('a',) over"
        " {'a': 3, 'b': 1}; omit the axes that do not divide it"
    )
    with pytest.raises(ConfigError, match=re.escape(text)):
        found.read(
            0,
            lambda path: by_three if path[-2] == "norm" else SingleDeviceSharding(jax.devices()[0]),
        )
    with pytest.raises(ConfigError, match="omit the axes that do not divide it"):
        found.read(0, by_three)


@pytest.mark.slow
@both_stacks
@pytest.mark.parametrize("quant", [None, "nf4"])
def test_leaves_may_lie_in_the_memory_of_the_host(
    reference: Any, quant: str | None, scan: bool
) -> None:
    folder = reference("llama", "causal_lm", **SIZES).folder
    _, plain = jaxpeft.load(folder, task="causal_lm", quant=quant, scan_layers=scan)
    found = outlined(folder, quant=quant, scan_layers=scan)
    at = places(found.leaves, mesh_of((4, 2)), "layers")
    params = found.read(0, lambda path: at(path).with_memory_kind("pinned_host"))
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(params)} == {"pinned_host"}
    assert_bit_equal(params, plain)


# --------------------------------------------------------------------------------- heads and tokens


@each_way
@pytest.mark.representatives("whole")
def test_a_new_head_has_the_same_numbers_on_any_mesh(reference: Any, way: str) -> None:
    folder = reference("roberta", "encoder").folder
    options: Any = {"task": "sequence_classification", "num_labels": 4, "scan_layers": True}
    _, plain = jaxpeft.load(folder, **options)
    for shape in ((4, 2), (2, 2)):
        found, params = spread(folder, shape, way, **options)
        assert found.plan.new
        assert_bit_equal(params, plain)


@each_way
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.representatives("True-rows", "False-both")
def test_added_tokens_are_cut_with_the_others_and_have_the_same_numbers(
    reference: Any, way: str, tied: bool
) -> None:
    folder = reference("llama", "causal_lm", tie_word_embeddings=tied).folder
    options: Any = {
        "vocab_size": 104,
        "dtype": jnp.bfloat16,
    }  # 99 in the file, which no number of devices divides
    _, plain = jaxpeft.load(folder, task="causal_lm", **options)
    _, params = spread(folder, (4, 2), way, **options)
    assert params["model"]["embed_tokens"]["embedding"].shape == (104, 32)
    assert_bit_equal(params, plain)


def test_the_mean_of_many_rows_is_the_same_for_every_part(tmp_path: FilePath) -> None:
    wanted = np.random.default_rng(0).standard_normal((5003, 24)).astype(np.float32)
    shard(tmp_path, {"m.safetensors": {"x": wanted}})
    grown = ExtendedTensor(open_folder(tmp_path)["x"], 5007, np.dtype(np.float32))
    whole = grown.read_rows(5000, 5007)
    np.testing.assert_array_equal(whole[:3], wanted[5000:])
    np.testing.assert_allclose(whole[3:], np.broadcast_to(wanted.mean(0), (4, 24)), atol=1e-6)
    parts = [grown.read_rows(5004, 5005, (start, start + 6)) for start in range(0, 24, 6)]
    np.testing.assert_array_equal(np.concatenate(parts, 1), whole[4:5])


def test_of_a_tied_head_that_is_there_twice_each_process_compares_its_part(
    reference: Any, tmp_path: FilePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(tensors: Any) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][70] += 1

    tied = reference("llama", "causal_lm", tie_word_embeddings=True).folder
    folder = edited(tied, tmp_path / "m", twice)
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    for i in range(4):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        if i == 2:  # rows 49 to 73
            with pytest.raises(
                WeightsError, match=r"ties the head to the embedding, but lm_head\.weight differs"
            ):
                outlined(folder)
        else:
            assert outlined(folder).meter.bytes == pytest.approx(2 * 99 * 32 * 4 / 4, rel=0.05)


# ---------------------------------------------------------------------------------------- quantized


BASES = {"flat": (SIZES, (4, 2)), "rows": (WIDE, (2, 2)), "padded": (PADDED, (3, 1))}


@both_stacks
@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize(
    ("form", "base"),
    [*(("nf4", base) for base in BASES), *((form, "rows") for form in QUANTIZED if form != "nf4")],
)
@pytest.mark.representatives("fp8-rows-rows-unrolled")
def test_codes_and_scales_are_bit_by_bit_those_of_one_device(
    reference: Any, form: Any, way: str, scan: bool, base: str
) -> None:
    sizes, shape = BASES[base]
    folder = reference("llama", "causal_lm", **sizes).folder
    _, alone = jaxpeft.load(folder, task="causal_lm", scan_layers=scan, quant=form)
    found, params = spread(folder, shape, way, scan_layers=scan, quant=form)
    wanted = places(found.leaves, mesh_of(shape), way)
    assert all(leaf.sharding == wanted(path) for path, leaf in paths.walk(params))
    codes = next(
        leaf
        for path, leaf in paths.walk(params)
        if path[-2:] == ("q_proj", QUANTIZED[form].leaves[0])
    )
    assert not codes.sharding.is_fully_replicated
    assert_bit_equal(params, alone)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), found.leaves
    )
    in_the_file = jax.tree.leaves(outlined(folder, scan_layers=scan).leaves)
    assert found.meter.bytes == sum(leaf.size * leaf.dtype.itemsize for leaf in in_the_file)


@pytest.mark.slow
def test_leaves_of_one_kernel_may_be_cut_differently(reference: Any) -> None:
    folder = reference("llama", "causal_lm", **WIDE).folder
    _, alone = jaxpeft.load(folder, task="causal_lm", scan_layers=True, quant="nf4")
    found, mesh = outlined(folder, scan_layers=True, quant="nf4"), mesh_of((2, 2))
    layers, rows = (places(found.leaves, mesh, way) for way in ("layers", "rows"))
    for kind in ("device", "pinned_host"):

        def place(path: Any, kind: str = kind) -> NamedSharding:
            return (rows if path[-1].endswith("absmax") else layers)(path).with_memory_kind(kind)

        assert_bit_equal(found.read(0, place), alone)


def test_what_is_added_up_over_a_kernel_is_added_up_on_every_device(reference: Any) -> None:
    from jaxpeft.quant import sharded
    from jaxpeft.quant.quantize import Quant

    mesh = mesh_of((4, 1))
    at = {
        "kernel_nf4": PartitionSpec("a"),
        "kernel_nf4_absmax": PartitionSpec("a"),
        "kernel_nf4_absmax_scale": PartitionSpec(),
        "kernel_nf4_absmax_mean": PartitionSpec(),
    }
    store: Any = sharded._compile(
        Quant("nf4"), tuple((key, NamedSharding(mesh, spec)) for key, spec in at.items())
    )
    kernel = jax.ShapeDtypeStruct(
        (128, 256), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "a"))
    )
    program = store.lower(kernel).compile().as_text()
    assert "all-gather" in program and "all-reduce" not in program
    # only the scales are gathered, 512 of them, never the kernel
    assert re.findall(r"(f32\[[\d,]+\])\S* all-gather\(", program) in (
        ["f32[256,2]"],
        ["f32[512]"],
        ["f32[512,1]"],
    )


def test_every_kernel_of_a_shape_is_quantized_by_one_program(reference: Any) -> None:
    from jaxpeft.quant import sharded

    sharded._compile.cache_clear()
    spread(reference("llama", "causal_lm", **SIZES).folder, (4, 2), "rows", quant="int4")
    assert sharded._compile.cache_info().currsize == 1
