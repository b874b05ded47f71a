"""Where kernels are brought from and to while a layer computes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import PartitionSpec as P

from jaxpeft.config import load
from jaxpeft.config.schema import Config
from jaxpeft.hub.fetching import fetch_kernels
from jaxpeft.plan import topology
from jaxpeft.plan.collectives import collectives
from jaxpeft.plan.examine import Setting, prepare, step_of
from jaxpeft.plan.hlo import parse
from jaxpeft.plan.step_arguments import step_arguments
from jaxpeft.plan.subject import with_changes
from jaxpeft.sharding.layout import layout
from jaxpeft.sharding.mesh import make_mesh
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import sharding_rules
from tests.plan.tiny import SMALL, write


def changed(folder: Path, **options: Any) -> Config:
    return with_changes(load(write(folder)[0]), model__remat="none", **options)


def setting(scan: bool) -> Setting:
    where = topology.read("cpu:8")
    return Setting(SMALL, where, topology.devices(where), None, scan)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
def test_the_codes_of_a_layer_are_gathered_and_not_what_they_stand_for(
    tmp_path: Path, scan: bool
) -> None:
    config = changed(tmp_path, mesh__strategy="fsdp", model__quant="nf4")
    mesh, run, _ = prepare(setting(scan), config)
    placed = step_arguments(run, mesh)
    text = (
        step_of(run, placed, mesh)
        .lower(placed.state, placed.frozen, placed.batch)
        .compile()
        .as_text()
    )
    found = [one for one in collectives(parse(text), mesh.shape) if one.kind == "all-gather"]
    parameters = 2 * (4 * 512 * 512 + 3 * 512 * 1024)
    # of the layers' kernels once forward and once backward, and the head in float32 in each pass,
    # which is not quantized
    assert sum(one.nbytes for one in found) < 2 * (0.52 * parameters + 4 * 512 * 1024)


def test_specs_of_codes_within_a_layer(tmp_path: Path) -> None:
    for scan in (True, False):
        config = changed(
            tmp_path, mesh__strategy="fsdp_tensor", mesh__tensor=2, model__quant="int8"
        )
        gathered = dict(prepare(setting(scan), config)[1].model.options.gathered)
        assert gathered["self_attn", "q_proj", "kernel_int8"] == P("tensor")
        assert gathered["mlp", "down_proj", "kernel_int8"] == P(None, "tensor")
        assert {path[1] for path in gathered} == {
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        }


@pytest.mark.parametrize(
    ("options", "gathers", "waits", "remat"),
    [
        ({"model__quant": "nf4", "mesh__strategy": "fsdp"}, True, False, "products"),
        ({"model__quant": "nf4", "mesh__strategy": "tensor"}, False, False, "none"),
        ({"model__quant": "nf4"}, False, False, "none"),
        ({"mesh__strategy": "fsdp"}, False, False, "none"),
        ({"mesh__strategy": "replicated", "mesh__offload": True}, False, True, "products"),
    ],
)
def test_what_is_brought_is_not_kept_for_the_backward_pass(
    tmp_path: Path, options: dict[str, Any], gathers: bool, waits: bool, remat: str
) -> None:
    found = prepare(setting(True), changed(tmp_path, **options))[1].model.options
    assert (bool(found.gathered), found.offload, found.remat) == (gathers, waits, remat)


def test_a_model_of_one_device_stays_as_it_is(tmp_path: Path) -> None:
    config = changed(tmp_path, model__quant="nf4")
    run = prepare(setting(True), config)[1]
    one = make_mesh(dataclasses.replace(config, mesh=MeshConfig()), jax.devices()[:1])
    assert fetch_kernels(run.model, layout(one, sharding_rules(config.mesh), run.base)) == run.model
