"""The mesh over devices, and batches on it."""

from __future__ import annotations

import dataclasses
import logging
import re
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jaxpeft.config.data_config import DataConfig
from jaxpeft.config.schema import Config
from jaxpeft.config.train_config import TrainConfig
from jaxpeft.errors import ConfigError
from jaxpeft.processes.arrays import put_batch
from jaxpeft.sharding.mesh import (
    batch_shardings,
    evaluation_rows,
    heads_of,
    make_mesh,
    replicated_sharding,
)
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.sizes import Heads


def config(batch_size: int = 8, max_length: int = 16, **options: Any) -> Config:
    train = TrainConfig(steps=1, batch_size=batch_size)
    return Config(mesh=MeshConfig(**options), train=train, data=DataConfig(max_length=max_length))


def test_all_axes_are_always_there() -> None:
    mesh = make_mesh(config())
    assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "expert": 1, "sequence": 1, "tensor": 1}
    assert mesh.devices.flat[0] == jax.devices()[0]


def test_a_strategy_says_its_mesh(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "jaxpeft"):
        make_mesh(config(strategy="fsdp_tensor"), heads=Heads(4, 2))
    assert caplog.messages == [
        (
            "mesh for strategy fsdp_tensor: fsdp 4 x tensor 2 (tensor between neighbors, fsdp over the"
            " rest)"
        )
    ]


def test_heads_of_keys_that_tensor_does_not_divide_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    make_mesh(config(strategy="tensor"), heads=Heads(8, 4))
    assert (
        "mesh.tensor: 8 does not divide the 4 key/value heads, so each device computes all of"
        " them" in caplog.text
    )


def test_hybrid_keeps_fsdp_within_a_group() -> None:
    devices = make_mesh(config(strategy="hybrid_fsdp", slices=2)).devices.reshape(2, 4)
    assert [[device.id for device in row] for row in devices] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@dataclass(frozen=True)
class Device:
    """One of a described topology."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "gpu"
    device_kind: str = "described"


def test_hosts_are_the_groups_where_there_are_no_slices() -> None:
    devices = [Device(i, i // 4) for i in (0, 4, 1, 5, 2, 6, 3, 7)]
    along = make_mesh(config(strategy="hybrid_fsdp"), devices).devices.reshape(2, 4)
    assert [{device.process_index for device in row} for row in along] == [{0}, {1}]
    along = make_mesh(config(strategy="fsdp", slices=-1, across="fsdp"), devices).devices.reshape(8)
    assert [device.process_index for device in along] == [0] * 4 + [1] * 4


def test_slices_that_are_not_those_of_the_devices_are_refused() -> None:
    devices = [Device(i, i // 4) for i in range(8)]
    said = "mesh.slices: is 4, but the devices are in 2 groups; set it to 2, or to -1"
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_mesh(config(strategy="fsdp", slices=4, across="fsdp"), devices)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"strategy": "fsdp", "slices": 2},
            (
                "mesh.data: 1 is not divisible by 2 slices; set it to 2 or 4, or set"
                " mesh.across to fsdp"
            ),
        ),
        (
            {"strategy": "tensor", "slices": 2},
            "mesh.data: 1 is not divisible by 2 slices; set it to 2 or 4",
        ),
        (
            {"strategy": "replicated", "slices": 16},
            "mesh.slices: 16 does not divide 8 devices; set it to 4 or 8",
        ),
        (
            {"strategy": "hybrid_fsdp", "slices": 3},
            "mesh.slices: 3 does not divide 8 devices; set it to 2 or 4",
        ),
        (
            {"strategy": "fsdp", "fsdp": 8, "slices": 2},
            "mesh.data: 1 is not divisible by 2 slices; set mesh.across to fsdp",
        ),
    ],
)
def test_what_does_not_go_over_slices_is_refused_with_what_would(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        make_mesh(config(**options))


def test_rows_go_over_data_and_fsdp_and_positions_over_sequence() -> None:
    mesh = make_mesh(config(strategy="sequence", data=2, fsdp=2))
    rows = {
        "input_ids": np.zeros((8, 16), np.int32),
        "weights": np.zeros(8),
        "labels": np.zeros((8, 3)),
    }
    assert {name: where.spec for name, where in batch_shardings(mesh, rows).items()} == {
        "input_ids": PartitionSpec(("data", "fsdp"), "sequence"),
        "weights": PartitionSpec(("data", "fsdp")),
        "labels": PartitionSpec(("data", "fsdp")),
    }
    parts = {"input_ids": np.zeros((2, 4, 16), np.int32), "weights": np.zeros((2, 4))}
    assert put_batch(mesh, parts, axis=1)["input_ids"].sharding.shard_shape((2, 4, 16)) == (2, 1, 8)


def test_labels_of_a_row_that_are_as_many_as_its_positions_have_none() -> None:
    mesh = make_mesh(config(strategy="sequence", data=2, fsdp=2))
    rows = {"input_ids": np.zeros((8, 16), np.int32), "labels": np.zeros((8, 16), np.float32)}
    assert batch_shardings(mesh, rows)["labels"].spec == PartitionSpec(("data", "fsdp"))
    rows["labels"] = rows["labels"].astype(np.int32)
    assert batch_shardings(mesh, rows)["labels"].spec == PartitionSpec(("data", "fsdp"), "sequence")


def test_a_batch_that_the_rows_do_not_divide_is_refused() -> None:
    said = "train.batch_size: 12 is not divisible by 8 devices = 8; set it to 8 or 16"
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_mesh(config(batch_size=12, strategy="fsdp"))
    said = "data.max_length: 20 is not divisible by mesh.sequence 8; set it to 16 or 24"
    with pytest.raises(ConfigError, match=re.escape(said)):
        make_mesh(config(max_length=20, strategy="sequence"))


def test_heads_of_a_config() -> None:
    assert heads_of({"num_attention_heads": 8, "num_key_value_heads": 2}) == (8, 2)
    assert heads_of({"n_heads": 12}) == (12, 12)
    assert heads_of({"num_key_value_heads": None, "num_attention_heads": 6}) == (6, 6)
    assert heads_of({}) is None


def test_every_device_holds_a_replicated_array() -> None:
    assert replicated_sharding(make_mesh(config(data=-1))).is_fully_replicated


@pytest.mark.parametrize(
    ("asked", "over", "rows"), [(8, 8, 8), (5, 8, 8), (64, 8, 64), (9, 8, 16), (5, 1, 5)]
)
def test_the_rows_of_an_evaluation_are_shared_evenly(asked: int, over: int, rows: int) -> None:
    options = config(data=over)
    options = dataclasses.replace(
        options, evaluation=dataclasses.replace(options.evaluation, batch_size=asked)
    )
    assert evaluation_rows(options, make_mesh(options)) == rows
