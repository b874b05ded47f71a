"""Checkpoints that hold all experts of a layer as one tensor: read expert by expert, in MXFP4 as
they are, and written in the same way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.hub.checkpoints import DescribedCheckpoint
from jaxpeft.hub.loading import outline_of
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.kernels import mxfp4
from tests.export.making import assert_close, ours, theirs
from tests.hub.helpers import Tensors, assert_bit_equal, edited, torch_base, trained
from tests.models.conftest import Reference, make_batch
from tests.representatives import both_stacks

CAUSAL = "causal_lm"
KIND = "gpt_oss"
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96}
CONFIG = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
}
PROJ = "model.layers.1.mlp.experts.down_proj"
Make = Callable[..., Reference]


def packed(kernels: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return blocks and scales of kernels `[experts, in, out]`, as published files have them."""
    leaves = jax.jit(jax.vmap(mxfp4.store))(jnp.asarray(kernels))
    codes, scales = (np.asarray(leaves[name]) for name in mxfp4.MXFP4.leaves)
    return codes.reshape(*scales.shape, 16), scales


def quantize(tensors: Tensors) -> None:
    for name in list(tensors):
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[f"{name}_blocks"], tensors[f"{name}_scales"] = packed(tensors.pop(name))


@pytest.fixture
def quantized(reference: Make, tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a tiny model whose experts are in MXFP4."""

    def make(then: Callable[[Tensors], Any] = lambda tensors: None, **config: Any) -> Path:
        def weights(tensors: Tensors) -> None:
            quantize(tensors)
            then(tensors)

        target = tmp_path / f"quantized{len(list(tmp_path.iterdir()))}"
        settings = {"quantization_config": CONFIG | config}
        folder = reference(KIND, CAUSAL, **SIZES).folder
        return edited(folder, target, weights, lambda c: c.update(settings))

    return make


def test_each_leaf_has_the_bytes_of_the_file(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    held = load_file(folder / "model.safetensors")
    _, params = jaxpeft.load(folder, task=CAUSAL, scan_layers=True)
    module = params["model"]["layers"]["mlp"]["experts"]["down_proj"]
    blocks, scales = held[f"{PROJ}_blocks"], held[f"{PROJ}_scales"]
    np.testing.assert_array_equal(module["kernel_mxfp4"][1], blocks.reshape(*blocks.shape[:2], -1))
    np.testing.assert_array_equal(module["kernel_mxfp4_scale"][1], scales)
    np.testing.assert_array_equal(module["bias"][1], held[f"{PROJ}_bias"])
    plain = params["model"]["layers"]["self_attn"]["q_proj"]
    assert plain["kernel"].dtype == np.float32
    sizes = {leaf.nbytes for path, leaf in paths.walk(params) if paths.EXPERTS in path}
    assert max(sizes) == module["kernel_mxfp4"].size * 2  # no expert is decoded


@pytest.mark.slow
@both_stacks
@pytest.mark.representatives("scanned")
def test_it_is_loaded_as_the_model_that_is_quantized_on_the_way(
    reference: Make, quantized: Callable[..., Path], scan: bool
) -> None:
    how = jaxpeft.Quant("mxfp4", targets=r".*\.experts\..*")
    folder = reference(KIND, CAUSAL, **SIZES).folder
    _, wanted = jaxpeft.load(folder, task=CAUSAL, scan_layers=scan, quant=how)
    for quant in (None, "mxfp4"):
        model, params = jaxpeft.load(quantized(), task=CAUSAL, scan_layers=scan, quant=quant)
        assert_bit_equal(params, wanted)
        assert model.options.quant == jaxpeft.Quant(
            "mxfp4", exclude=("k_proj", "o_proj", "q_proj", "v_proj")
        )


@both_stacks
@pytest.mark.representatives("scanned")
def test_logits_are_those_of_transformers_with_dequantized_kernels(
    quantized: Callable[..., Path], scan: bool
) -> None:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = quantized()
    held = load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    torch_model = torch_base(folder, CAUSAL)
    for name, leaf in torch_model.named_parameters():
        if f"{name}_blocks" in held:
            parts = (torch.tensor(held[f"{name}_{part}"]) for part in ("blocks", "scales"))
            leaf.data = convert_moe_packed_tensors(*parts, dtype=torch.float32)
    model, params = jaxpeft.load(quantized(), task=CAUSAL, dtype=jnp.float32, scan_layers=scan)
    assert_close(ours(model, params), theirs(CAUSAL, torch_model))


@pytest.mark.slow
def test_a_mesh_reads_its_shards_and_computes_the_same(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    ids = np.tile(make_batch("none").ids[:2], (2, 1))
    method = jaxpeft.LoRA(rank=4, targets="all-linear")
    config = jaxpeft.MeshConfig(strategy="fsdp_tensor", fsdp=2, tensor=2)
    mesh = jaxpeft.create_device_mesh(config)
    spread = {"mesh": mesh, "rules": jaxpeft.sharding_rules(config)}
    outputs, codes = [], []
    for where in ({}, spread):
        model, base = jaxpeft.load(
            folder, task=CAUSAL, dtype=jnp.float32, scan_layers=True, **where
        )
        params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
        compute = partial(jaxpeft.apply, model)
        run = jax.jit(jaxpeft.on_mesh(mesh, compute) if where else compute)
        outputs.append(np.asarray(run(params, ids)))
        codes.append(base["model"]["layers"]["mlp"]["experts"]["down_proj"]["kernel_mxfp4"])
    np.testing.assert_array_equal(*codes)
    assert codes[1].sharding.shard_shape(codes[1].shape) == (2, 4, 32, 24)
    assert_close(*outputs)


@pytest.mark.slow
def test_a_plan_has_the_leaves_of_a_load(quantized: Callable[..., Path]) -> None:
    folder = quantized()
    config = json.loads((folder / "config.json").read_text())
    request = ModelRequest(CAUSAL, scan_layers=True)
    planned = outline_of(request, DescribedCheckpoint(config)).leaves
    _, params = jaxpeft.load(folder, task=CAUSAL, scan_layers=True)
    wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in paths.walk(params)}
    assert {path: (leaf.shape, leaf.dtype) for path, leaf in paths.walk(planned)} == wanted


@pytest.mark.slow
def test_a_merged_model_has_the_tensors_of_transformers(
    quantized: Callable[..., Path], tmp_path: Path
) -> None:
    model, base = jaxpeft.load(quantized(), task=CAUSAL, dtype=jnp.float32)
    method = jaxpeft.LoRA(rank=4, targets=("q_proj", "gate_up_proj", "down_proj", "router"))
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    export(ExportRequest(tmp_path / "a", "merged", tmp_path / "merged"))
    held = load_file(tmp_path / "merged" / "model.safetensors")
    assert held[PROJ].shape == (4, 96, 64) and held[f"{PROJ}_bias"].shape == (4, 64)
    assert "quantization_config" not in json.loads(
        (tmp_path / "merged" / "config.json").read_text()
    )
    assert_close(theirs(CAUSAL, torch_base(tmp_path / "merged", CAUSAL)), ours(model, params))


def drop(end: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(f"{PROJ}{end}")


def change(end: str, how: Callable[[Any], Any]) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{PROJ}{end}": how(tensors[f"{PROJ}{end}"])})


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (drop("_scales"), "missing: .*down_proj_scales"),
        (drop("_blocks"), "missing: .*down_proj_blocks"),
        (
            change("_scales", lambda t: t.astype(np.int32)),
            r"quantized: .*down_proj_scales is int32, must be uint8",
        ),
        (
            change("_blocks", lambda t: t[..., :8]),
            r"misshaped: .*down_proj_blocks is \[4, 64, 3, 8\], must be \[4, 64, 3, 16\]",
        ),
        (
            change("_bias", lambda t: t[:, :5]),
            r"misshaped: model\.layers\.1\.mlp\.experts\.0\.down_proj\.bias is \[5\]",
        ),
        (
            change("_bias", lambda t: t[:3]),
            r"missing: model\.layers\.1\.mlp\.experts\.3\.down_proj\.bias",
        ),
        (
            change("_bias", lambda t: np.concatenate([t, t])),
            r"extra: model\.layers\.1\.mlp\.experts\.4\.down_proj\.bias is not part",
        ),
    ],
    ids=["no scales", "no blocks", "dtype", "blocks", "bias", "few experts", "many experts"],
)
@pytest.mark.representatives("no scales", "few experts")
def test_tensors_that_do_not_fit_are_named(
    quantized: Callable[..., Path], then: Callable[[Tensors], Any], said: str
) -> None:
    with pytest.raises(WeightsError, match=said) as caught:
        jaxpeft.load(quantized(then), task=CAUSAL)
    assert len(set(caught.value.problems)) == len(caught.value.problems)


@pytest.mark.slow
def test_another_quantization_than_that_of_the_files_is_refused(
    quantized: Callable[..., Path],
) -> None:
    with pytest.raises(ConfigError, match=r"quant: is 'nf4', but .* is already quantized"):
        jaxpeft.load(quantized(), task=CAUSAL, quant="nf4")
    with pytest.raises(ConfigError, match=r"quantization_config: .* load the unquantized model"):
        jaxpeft.load(quantized(quant_method="fp8"), task=CAUSAL)


@pytest.mark.slow
def test_files_without_the_quantization_of_their_config_are_refused(
    reference: Make, tmp_path: Path
) -> None:
    folder = edited(
        reference(KIND, CAUSAL, **SIZES).folder,
        tmp_path / "plain",
        config=lambda c: c.update(quantization_config=CONFIG),
    )
    with pytest.raises(
        WeightsError, match="no tensor is quantized; remove it, and set quant='mxfp4'"
    ):
        jaxpeft.load(folder, task=CAUSAL)


def test_a_kernel_of_other_widths_than_blocks_is_refused(reference: Make) -> None:
    with pytest.raises(
        ConfigError, match="has 48 inputs, but mxfp4 needs multiples of 32; exclude"
    ):
        reference(KIND, CAUSAL).load(quant="mxfp4")
