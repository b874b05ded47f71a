"""The cache of quantized kernels: bit-equal to those quantized anew, whole or not used, and never
in the way.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft import cache
from jaxpeft.hub.weights import quantized_cache
from jaxpeft.kernels import QUANTIZED
from jaxpeft.quant import sharded
from tests.hub.helpers import assert_bit_equal, edited

TASK: Any = "causal_lm"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that takes small bases."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(quantized_cache, "LEAST_BYTES", 1)
    return tmp_path / "cache" / "quantised"


@pytest.fixture
def base(reference: Any) -> Path:
    return reference("llama", TASK, intermediate_size=64).folder


@pytest.fixture
def quantizing(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the kernels that are quantized."""
    counted, plain = list[int](), sharded.store_sharded

    def stored(quant: Any, read: Any, layers: int | None, places: Any) -> Any:
        counted.append(layers or 1)
        return plain(quant, read, layers, places)

    monkeypatch.setattr(sharded, "store_sharded", stored)
    return counted


def entries(root: Path) -> list[Path]:
    return sorted(root.iterdir()) if root.is_dir() else []


@pytest.mark.parametrize("form", QUANTIZED)
@pytest.mark.parametrize("written", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.representatives("unrolled-int8")
def test_what_is_read_again_is_bit_by_bit_what_was_quantized(
    root: Path,
    base: Path,
    quantizing: list[int],
    caplog: pytest.LogCaptureFixture,
    form: Any,
    written: bool,
) -> None:
    caplog.set_level(logging.INFO)
    wanted = {
        scan: jaxpeft.load(base, task=TASK, scan_layers=scan, quant=form, cache=False)[1]
        for scan in (False, True)
    }
    assert not entries(root)
    _, first = jaxpeft.load(base, task=TASK, scan_layers=written, quant=form)
    (folder,) = entries(root)
    assert f"quantized kernels to {folder}" in caplog.text
    assert_bit_equal(first, wanted[written])
    quantizing.clear()
    for scan in (False, True):
        model, params = jaxpeft.load(base, task=TASK, scan_layers=scan, quant=form)
        assert_bit_equal(params, wanted[scan])
        assert model.options.quant == jaxpeft.Quant(form)
    assert not quantizing
    assert f"reading the quantized kernels from {folder}" in caplog.text


def test_it_holds_the_quantized_kernels_alone(root: Path, base: Path) -> None:
    jaxpeft.load(base, task=TASK, quant="nf4")
    (folder,) = entries(root)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors", "quantised.json"}
    held = json.loads((folder / "quantised.json").read_text())
    assert held["what"]["form"] == "nf4" and len(held["what"]["kernels"]) == 14
    assert len(held["sha256"]) == 4 * 14
    assert {name.rpartition(".")[2] for name in held["sha256"]} == set(QUANTIZED["nf4"].leaves)


@pytest.mark.slow
def test_what_the_kernels_depend_on_is_told_apart(root: Path, base: Path, tmp_path: Path) -> None:
    hows = [
        "nf4",
        jaxpeft.Quant("nf4", exclude=("q_proj",)),
        "int4",
        jaxpeft.Quant("int4", group=16),
    ]
    for n, how in enumerate(hows, 1):
        jaxpeft.load(base, task=TASK, quant=how)
        assert len(entries(root)) == n
    jaxpeft.load(base, task=TASK, quant="nf4", dtype=jnp.bfloat16)
    # changes no kernel that is quantized
    jaxpeft.load(base, task=TASK, quant="nf4", vocab_size=120)
    assert len(entries(root)) == 5

    def change(tensors: Any) -> None:
        tensors["model.layers.0.self_attn.q_proj.weight"] *= 2

    copy = edited(base, tmp_path / "copy")
    jaxpeft.load(copy, task=TASK, quant="nf4")
    shutil.rmtree(copy)
    edited(base, copy, change)
    _, params = jaxpeft.load(copy, task=TASK, quant="nf4")
    assert len(entries(root)) == 7
    assert_bit_equal(params, jaxpeft.load(copy, task=TASK, quant="nf4", cache=False)[1])


def test_it_is_read_onto_many_devices(root: Path, base: Path, quantizing: list[int]) -> None:
    _, wanted = jaxpeft.load(base, task=TASK, quant="nf4")
    quantizing.clear()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    _, params = jaxpeft.load(
        base, task=TASK, quant="nf4", sharding=NamedSharding(mesh, PartitionSpec())
    )
    assert not quantizing
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, wanted))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_what_waits_in_the_memory_of_the_host_is_kept_too(
    root: Path, base: Path, quantizing: list[int], scan: bool
) -> None:
    _, wanted = jaxpeft.load(base, task=TASK, quant="nf4", scan_layers=scan, cache=False)
    mesh = jax.make_mesh(
        (2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,)
    )
    where = NamedSharding(mesh, PartitionSpec(), memory_kind="pinned_host")
    for times in (1, 0):
        quantizing.clear()
        _, params = jaxpeft.load(base, task=TASK, quant="nf4", scan_layers=scan, sharding=where)
        assert bool(quantizing) is bool(times)
        assert len(entries(root)) == 1
        assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, wanted))


def test_axes_are_spread_where_they_can_be(
    root: Path, reference: Any, quantizing: list[int]
) -> None:
    folder = reference("llama", TASK, vocab_size=104).folder
    _, wanted = jaxpeft.load(folder, task=TASK, quant="nf4")
    quantizing.clear()
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    _, params = jaxpeft.load(
        folder, task=TASK, quant="nf4", sharding=NamedSharding(mesh, PartitionSpec("x"))
    )
    assert not quantizing
    leaves = params["model"]["layers"]["0"]["self_attn"]["q_proj"]
    assert leaves["kernel_nf4"].addressable_shards[0].data.shape == (4, 16)
    assert leaves["kernel_nf4_absmax_mean"].sharding.is_fully_replicated
    assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, wanted))


def flip(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-5] ^= 4
    (folder / "model.safetensors").write_bytes(data)


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


def edit(folder: Path) -> None:
    record = json.loads((folder / "quantised.json").read_text())
    (folder / "quantised.json").write_text(json.dumps(record | {"what": {}}))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (flip, "the checksum of model.layers."),
        (cut, "bytes are missing"),
        (edit, "quantised.json belongs to another entry"),
        (lambda folder: (folder / "quantised.json").unlink(), "no such file"),
        (lambda folder: (folder / "quantised.json").write_text("{"), "not JSON"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
    ],
)
def test_a_damaged_one_is_told_and_made_anew(
    root: Path,
    base: Path,
    quantizing: list[int],
    caplog: pytest.LogCaptureFixture,
    damage: Any,
    why: str,
) -> None:
    _, wanted = jaxpeft.load(base, task=TASK, quant="nf4")
    (folder,) = entries(root)
    damage(folder)
    _, params = jaxpeft.load(base, task=TASK, quant="nf4")
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(f"{folder}: the cached kernels are damaged (") and why in message
    assert_bit_equal(params, wanted)
    quantizing.clear()
    _, again = jaxpeft.load(base, task=TASK, quant="nf4")
    assert not quantizing and entries(root) == [folder]
    assert_bit_equal(again, wanted)


@pytest.mark.parametrize("how", ["file", "full", "rename"])
def test_where_nothing_can_be_written_the_load_goes_on(
    root: Path,
    base: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    how: str,
) -> None:
    if how == "file":
        root.parent.write_text("not a folder")
    elif how == "full":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 10))  # type: ignore[attr-defined]
    else:

        def rename(*_: Any) -> None:
            raise OSError("no room")

        monkeypatch.setattr(Path, "replace", rename)
    _, params = jaxpeft.load(base, task=TASK, quant="nf4")
    (message,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert "the quantized kernels could not be cached (" in message
    assert message.endswith("continuing without a cache")
    assert how == "file" or not entries(root)
    assert_bit_equal(params, jaxpeft.load(base, task=TASK, quant="nf4", cache=False)[1])


def test_another_process_that_was_faster_is_no_trouble(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    jaxpeft.load(base, task=TASK, quant="nf4")
    there = entries(root)
    monkeypatch.setattr(quantized_cache.Entry, "open", lambda _: None)
    jaxpeft.load(base, task=TASK, quant="nf4")
    assert entries(root) == there
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_small_bases_and_plain_ones_are_not_kept(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jaxpeft.load(base, task=TASK)
    monkeypatch.setattr(quantized_cache, "LEAST_BYTES", 10**6)
    jaxpeft.load(base, task=TASK, quant="nf4")
    assert not entries(root)


def test_the_environment_says_where_or_that_it_is_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.setenv(cache.VARIABLE, "off")
    assert cache.folder() is None
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "jaxpeft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.folder() == Path.home() / ".cache" / "jaxpeft"


def test_it_is_off_where_the_environment_says_so(
    root: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "off")
    jaxpeft.load(base, task=TASK, quant="nf4")
    assert not entries(root) and not Path("off").exists()
