"""Whole runs under strategies: the losses of one device, checkpoints on another mesh, a base in
host memory.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.config.schema import Config
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from jaxpeft.hub import fetching
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.sharding.layout import HOST
from jaxpeft.sharding.mesh import make_mesh
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.train import job, memory
from jaxpeft.train.begin import initialize
from jaxpeft.train.records import read_lines
from jaxpeft.train.setup import prepare

MakeConfig = Callable[..., Config]
CLOSE = 2e-5
"""Losses of six steps in float32, each of which carries the rounding of those before it."""


@pytest.fixture
def config(make_config: MakeConfig) -> Config:
    """A short run of a tiny Llama on packed rows, with checkpoints after the steps 3 and 6; no
    devices share 5 rows evenly.
    """
    return make_config(
        "text",
        data__packing=True,
        model__scan_layers=True,
        evaluation__batch_size=5,
        checkpoint__every_steps=3,
    )


def spread(config: Config, **mesh: Any) -> Config:
    return dataclasses.replace(config, mesh=MeshConfig(**mesh))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.parametrize(
    "mesh",
    [
        {"strategy": "fsdp"},
        {"strategy": "tensor"},
        {"strategy": "fsdp_tensor"},
        {"strategy": "sequence"},
        {"strategy": "hybrid_fsdp", "slices": 2},
        {"strategy": "fsdp", "offload": True},
    ],
    ids=lambda mesh: "_".join(map(str, mesh.values())),
)
@pytest.mark.slow  # processes/test_equality.py has one over processes
def test_a_run_learns_as_on_one_device_under_every_strategy(
    config: Config, tmp_path: Path, mesh: dict[str, Any]
) -> None:
    one = job.run(config, tmp_path / "one")
    many = job.run(spread(config, **mesh), tmp_path / "many")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=CLOSE)
    assert many.test == pytest.approx(one.test, rel=CLOSE)
    jaxpeft.load_adapter(
        tmp_path / "many" / "adapter", *jaxpeft.load(config.model.path, task="causal_lm")
    )


@pytest.mark.slow
def test_rows_of_several_lengths_make_the_same_batches_where_positions_are_spread(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a length more is worth its program, however short the run
    monkeypatch.setattr("jaxpeft.data.tokens.row_encoder._PROGRAM", 0)
    rows = tmp_path / "rows.jsonl"
    texts = (" ".join(f"word{(i * 7 + j) % 50}" for j in range(2 + 9 * i % 29)) for i in range(80))
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = make_config(
        "text",
        data__train=str(rows),
        data__max_length=32,
        data__lengths=(),
        model__scan_layers=True,
        evaluation__batch_size=8,
    )
    setups = [prepare(spread(config, strategy=strategy)) for strategy in ("fsdp", "sequence")]
    assert len(setups[0].data.batches.lengths) > 1
    assert setups[1].data.batches.lengths == (32,)
    orders = [
        [setup.data.batches.rows(step).tolist() for step in range(setup.steps)] for setup in setups
    ]
    assert orders[0] == orders[1]
    one = job.run(spread(config, strategy="fsdp"), tmp_path / "one")
    many = job.run(spread(config, strategy="sequence"), tmp_path / "many")
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=CLOSE)
    assert many.test == pytest.approx(one.test, rel=CLOSE)


@pytest.mark.slow
def test_parts_of_a_batch_add_up_on_a_mesh_too(config: Config, tmp_path: Path) -> None:
    parts = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation=2))
    for name, mesh in {
        "one": {},
        "many": {"strategy": "fsdp_tensor", "data": 2, "fsdp": 2, "tensor": 2},
    }.items():
        job.run(spread(parts, **mesh), tmp_path / name)
    np.testing.assert_allclose(losses(tmp_path / "many"), losses(tmp_path / "one"), rtol=CLOSE)


@pytest.mark.slow
def test_the_main_job_on_a_trained_llama_under_fsdp_and_tensor(
    assets: Path, config: Config, tmp_path: Path
) -> None:
    real = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(assets / "stories260K" / "hf")),
        data=dataclasses.replace(config.data, max_length=32),
        evaluation=dataclasses.replace(config.evaluation, samples=0),
    )
    job.run(real, tmp_path / "one")
    for strategy in ("fsdp", "tensor"):
        job.run(spread(real, strategy=strategy), tmp_path / strategy)
        np.testing.assert_allclose(
            losses(tmp_path / strategy), losses(tmp_path / "one"), rtol=CLOSE
        )


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_another_mesh_and_on_one_device(
    config: Config, tmp_path: Path
) -> None:
    job.run(spread(config, strategy="fsdp"), tmp_path / "whole")
    for name, mesh in {
        "tensor": {"strategy": "tensor", "tensor": 4},
        "one": {},
        "data": {"data": 2},
    }.items():
        folder = tmp_path / name
        shutil.copytree(tmp_path / "whole", folder)
        shutil.rmtree(folder / "checkpoints" / "6")
        done = job.run(spread(config, **mesh), folder)
        assert done.steps == 6
        np.testing.assert_allclose(losses(folder), losses(tmp_path / "whole"), rtol=CLOSE)


def test_trees_and_moments_lie_where_the_rules_say(config: Config) -> None:
    setup = prepare(spread(config, strategy="tensor", tensor=2))
    _, trainable, frozen = initialize(setup, config.method, None)
    specs = {
        paths.text(path): leaf.sharding.spec
        for path, leaf in (*paths.walk(trainable), *paths.walk(frozen))
    }
    assert specs["model/layers/mlp/gate_proj/kernel"] == jax.sharding.PartitionSpec(
        None, None, "tensor"
    )
    assert specs["model/layers/self_attn/q_proj/lora_b"] == jax.sharding.PartitionSpec(
        None, None, "tensor"
    )
    assert specs["model/norm/scale"] == jax.sharding.PartitionSpec()


def test_offloaded_kernels_stay_in_host_memory_and_the_step_takes_them_from_there(
    config: Config,
) -> None:
    setup = prepare(spread(config, strategy="fsdp", offload=True))
    assert (setup.model.options.offload, setup.model.options.remat) == (True, "products")
    _, _, frozen = initialize(setup, config.method, None)
    kinds = {paths.text(path): leaf.sharding.memory_kind for path, leaf in paths.walk(frozen)}
    assert {kind for path, kind in kinds.items() if path.endswith("_proj/kernel")} == {HOST}
    assert kinds["model/embed_tokens/embedding"] == "device"


@pytest.mark.slow
@pytest.mark.parametrize("start", ["pissa", "default"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_starts_that_read_the_base_read_it_in_host_memory_too(
    make_config: MakeConfig, start: str, quant: str
) -> None:
    made = make_config(
        "text",
        data__packing=True,
        model__scan_layers=True,
        model__quant=quant,
        evaluation__batch_size=8,
    )
    made = dataclasses.replace(made, method=dataclasses.replace(made.method, init_weights=start))  # type: ignore[call-arg]
    found = [
        initialize(prepare(spread(made, **mesh)), made.method, None)[1]
        for mesh in ({}, {"strategy": "fsdp", "offload": True})
    ]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(np.abs(a), np.abs(b), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh", [{"strategy": "fsdp"}, {"strategy": "fsdp", "offload": True}], ids=["fsdp", "offload"]
)
def test_a_start_from_data_is_that_of_one_device_whatever_is_computed_again(
    make_config: MakeConfig, mesh: dict[str, Any]
) -> None:
    made = make_config(
        "text",
        data__packing=True,
        model__scan_layers=True,
        model__quant="nf4",
        evaluation__batch_size=8,
    )
    method = dataclasses.replace(made.method, init_weights="eva", eva_batches=1)  # type: ignore[call-arg]
    made = dataclasses.replace(made, method=method)
    remat = dataclasses.replace(made, model=dataclasses.replace(made.model, remat="products"))
    found = [
        initialize(prepare(one), method, None)[1] for one in (made, remat, spread(made, **mesh))
    ]
    assert prepare(spread(made, **mesh)).model.options.remat == "products"
    for plain, *others in zip(*map(jax.tree.leaves, found), strict=True):
        for other in others:
            np.testing.assert_allclose(np.abs(plain), np.abs(other), rtol=1e-3, atol=1e-4)


def test_offload_is_refused_where_there_is_no_such_memory(config: Config) -> None:
    mesh = make_mesh(spread(config, strategy="fsdp"))

    class Device:
        device_kind = "some chip"

        def addressable_memories(self) -> list[Any]:
            return [dataclasses.make_dataclass("Memory", ["kind"])("hbm")]

    class Mesh:
        devices = np.array([Device()])

    fetching.require_host_memory(MeshConfig(offload=True), mesh)
    said = (
        r"mesh\.offload: the devices \(some chip\) have no pinned_host memory \(they have"
        r" hbm\); set it to False"
    )
    with pytest.raises(ConfigError, match=said):
        fetching.require_host_memory(MeshConfig(offload=True), Mesh())  # type: ignore[arg-type]


def test_memory_is_estimated_for_each_device(config: Config) -> None:
    outlined = outline(config.model.path, ModelRequest("causal_lm", scan_layers=True))

    def base(**mesh: Any) -> memory.Estimate:
        made = spread(config, **mesh)
        where = memory.layout_of(outlined, make_mesh(made), sharding_rules(made.mesh))
        return memory.estimate(outlined, 100, 2, 16, where)

    whole, fsdp, tensor = base(), base(strategy="fsdp"), base(strategy="tensor", tensor=2)
    leaves = jax.tree.leaves(outlined.abstract)
    assert whole.base == sum(leaf.size * 4 for leaf in leaves)
    norms = sum(leaf.size * 4 for leaf in leaves if leaf.ndim == 1 or leaf.shape[-2] == 2)
    assert whole.base / 8 < fsdp.base < whole.base / 8 + norms + whole.base / 4
    assert whole.base / 2 < tensor.base < 0.7 * whole.base
    assert (
        tensor.kept["products"] < whole.kept["products"]
        and tensor.kept["full"] == whole.kept["full"]
    )
    assert fsdp.working > whole.working
    assert base(strategy="fsdp", offload=True).base < fsdp.base
