"""The sizes of the mesh's axes, and what is said of those that cannot be."""

from __future__ import annotations

import re
from typing import Any

import pytest

from jaxpeft.config import defaults
from jaxpeft.config.files import parse_config
from jaxpeft.errors import ConfigError
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.sizes import AXES, Heads, sizes


@pytest.mark.parametrize(
    ("options", "devices", "wanted"),
    [
        ({}, 8, (1, 1, 1, 1, 1)),
        ({"data": -1}, 8, (8, 1, 1, 1, 1)),
        ({"data": 2}, 8, (2, 1, 1, 1, 1)),
        ({"strategy": "replicated"}, 8, (8, 1, 1, 1, 1)),
        ({"strategy": "fsdp"}, 8, (1, 8, 1, 1, 1)),
        ({"strategy": "fsdp", "data": 2}, 8, (2, 4, 1, 1, 1)),
        ({"strategy": "fsdp", "fsdp": 4}, 8, (2, 4, 1, 1, 1)),
        ({"strategy": "tensor"}, 4, (1, 1, 1, 1, 4)),
        ({"strategy": "tensor", "tensor": 2}, 8, (4, 1, 1, 1, 2)),
        ({"strategy": "fsdp_tensor"}, 16, (1, 4, 1, 1, 4)),
        ({"strategy": "fsdp_tensor", "tensor": 2}, 16, (1, 8, 1, 1, 2)),
        ({"strategy": "sequence"}, 8, (1, 1, 1, 8, 1)),
        ({"strategy": "sequence", "fsdp": 2}, 8, (1, 2, 1, 4, 1)),
        ({"strategy": "hybrid_fsdp", "slices": 2}, 8, (2, 4, 1, 1, 1)),
        ({"strategy": "hybrid_fsdp"}, 8, (1, 8, 1, 1, 1)),
        ({"strategy": "fsdp", "expert": 2, "rules": ((".*x", "expert"),)}, 8, (1, 4, 2, 1, 1)),
    ],
)
def test_a_strategy_gives_its_own_axis_what_is_left(
    options: dict[str, Any], devices: int, wanted: tuple[int, ...]
) -> None:
    found = sizes(MeshConfig(**options), devices, heads=Heads(8, 4))
    assert tuple(found) == AXES
    assert tuple(found.values()) == wanted


def test_hybrid_goes_over_as_many_groups_as_the_devices_say() -> None:
    assert tuple(sizes(MeshConfig(strategy="hybrid_fsdp"), 16, groups=4).values()) == (
        4,
        4,
        1,
        1,
        1,
    )
    assert tuple(sizes(MeshConfig(strategy="hybrid_fsdp", slices=-1), 16, groups=2).values()) == (
        2,
        8,
        1,
        1,
        1,
    )


def test_several_processes_spread_the_rows_over_all_devices() -> None:
    assert tuple(sizes(MeshConfig(), 16, groups=4).values()) == (16, 1, 1, 1, 1)
    assert tuple(sizes(MeshConfig(), 16, groups=1).values()) == (1, 1, 1, 1, 1)
    assert tuple(sizes(MeshConfig(data=8), 16, groups=4).values()) == (8, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("devices", "heads", "wanted"),
    [(8, 8, (1, 8)), (16, 8, (2, 8)), (8, 6, (4, 2)), (8, 5, (8, 1))],
)
def test_tensor_alone_takes_as_many_devices_as_there_are_heads(
    devices: int, heads: int, wanted: tuple[int, int]
) -> None:
    found = sizes(MeshConfig(strategy="tensor"), devices, heads=Heads(heads, 1))
    assert (found["data"], found["tensor"]) == wanted


@pytest.mark.parametrize(("heads", "tensor"), [(None, 8), (8, 8), (6, 2), (4, 4), (5, 1)])
def test_tensor_divides_the_heads_and_the_devices(heads: int | None, tensor: int) -> None:
    assert (
        sizes(MeshConfig(strategy="fsdp_tensor"), 32, heads=heads and Heads(240, heads))["tensor"]
        == tensor
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": 16}, "mesh.data: needs 16 devices, there are 8; set it to 8 or less, or to -1"),
        (
            {"strategy": "fsdp_tensor", "fsdp": 4, "tensor": 4},
            "mesh: fsdp 4 x tensor 4 needs 16 devices, there are 8; set mesh.fsdp to 2 or less",
        ),
        (
            {"strategy": "tensor", "tensor": 4, "data": 2},
            "mesh.tensor: 4 does not divide the model's 6 heads; set it to 1 or 2",
        ),
        (
            {"strategy": "fsdp", "data": 3},
            (
                "mesh.fsdp: takes the rest, but 8 devices are not divisible by data 3 = 3;"
                " set mesh.data to 2 or 4"
            ),
        ),
    ],
)
def test_an_impossible_mesh_is_refused_with_the_arithmetic(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
        sizes(MeshConfig(**options), 8, heads=Heads(6, 6))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": 0}, "data: must be -1 or at least 1, is 0"),
        ({"slices": 0}, "slices: must be -1 or at least 1, is 0"),
        (
            {"strategy": "fsdp", "data": -1, "fsdp": -1},
            (
                "fsdp: data and fsdp are both -1, but only one axis can take the rest; give the other a"
                " size"
            ),
        ),
        (
            {"fsdp": 4},
            (
                "fsdp: is not used by strategy None; set mesh.strategy to fsdp or"
                " fsdp_tensor or sequence or hybrid_fsdp"
            ),
        ),
        (
            {"strategy": "fsdp", "expert": 2},
            ("expert: is not used by strategy fsdp; use it in mesh.rules, or remove it"),
        ),
        (
            {"strategy": "fsdp", "data": 3, "slices": 2},
            "data: 3 is not divisible by 2 slices; set it to 2 or 4",
        ),
        (
            {"strategy": "hybrid_fsdp", "across": "fsdp"},
            "across: hybrid_fsdp crosses slices along data; to shard along fsdp across slices, set",
        ),
        (
            {"strategy": "fsdp", "expert": 4, "rules": ((".*/lora_a",),)},
            "expert: is not used by strategy fsdp",
        ),
        ({"rules": ((),)}, "rules[0]: is empty; start it with a regular expression for a path"),
        ({"rules": (("(", "data"),)}, "rules[0]: '(' is not a regular expression"),
        ({"rules": ((".*", "tensr"),)}, "rules[0]: 'tensr' is not an axis; did you mean 'tensor'?"),
        (
            {"rules": ((".*", "data", "fsdp+data"),)},
            "rules[0]: uses an axis twice, in 'data', 'fsdp+data'; use each axis once per leaf",
        ),
    ],
)
def test_options_that_exclude_each_other(options: dict[str, Any], said: str) -> None:
    (found,) = MeshConfig(**options).problems()
    assert found.startswith(said)


@pytest.mark.parametrize(
    ("mesh", "said"),
    [
        (
            {"data": 3},
            (
                "config.train.batch_size: 32 is not divisible by mesh.data 3 x accumulation 1 = 3;"
                " set it to 30 or 33"
            ),
        ),
        (
            {"strategy": "fsdp", "data": 2, "fsdp": 24},
            (
                "config.train.batch_size: 32 is not divisible by mesh.data 2 x mesh.fsdp 24 x"
                " accumulation 1 = 48; set it to 48"
            ),
        ),
        (
            {"strategy": "sequence", "sequence": 3},
            (
                "config.data.max_length: 128 is not divisible by mesh.sequence 3; set it to 126"
                " or 129"
            ),
        ),
    ],
)
def test_batches_that_cannot_be_spread_are_refused_before_jax_is_imported(
    mesh: dict[str, Any], said: str
) -> None:
    values = defaults().to_dict()
    values["model"]["path"] = values["data"]["train"] = "x"
    values["train"]["steps"] = 1
    values["mesh"] |= mesh
    assert said in parse_config(values)[1]
