"""Checkpoints that `bitsandbytes` has quantized: loaded as they are, merged, and everything that
does not fit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.tree import count
from jaxpeft.errors import ConfigError, JaxpeftError, WeightsError
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.kernels import nf4
from tests.core.helpers import run
from tests.hub.helpers import Tensors, assert_bit_equal, edited, trained

both = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
CONFIG = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
}
LINEAR = r".*\.(\w+_proj|query|key|value|dense)\.weight"
Q = "model.layers.1.self_attn.q_proj.weight"
STATE = f"{Q}.quant_state.bitsandbytes__nf4"
Change = Callable[[Tensors], Any]


def text(state: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.frombuffer(json.dumps(state).encode(), np.uint8).copy()


def packed(name: str, weight: Any, double: bool) -> Tensors:
    """Return the tensors that Hugging Face saves of a matrix `[out, in]`, made of what jaxpeft
    gives.
    """
    leaves = jax.tree.map(np.asarray, jax.jit(nf4.store)(jnp.asarray(weight).T))
    absmax = np.abs(np.asarray(nf4.blocks_of(jnp.asarray(weight).T))).max(axis=1)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": list(weight.shape)}
    nested = {
        "nested_blocksize": 256,
        "nested_dtype": "float32",
        "nested_offset": float(leaves["kernel_nf4_absmax_mean"]),
    }
    out = {
        name: leaves["kernel_nf4"].reshape(-1, 1),
        f"{name}.absmax": leaves["kernel_nf4_absmax"].reshape(-1) if double else absmax,
        f"{name}.quant_map": np.asarray(nf4.CODES, np.float32),
        f"{name}.quant_state.bitsandbytes__nf4": text(state | (nested if double else {})),
    }
    if double:
        out[f"{name}.nested_absmax"] = leaves["kernel_nf4_absmax_scale"]
        out[f"{name}.nested_quant_map"] = np.asarray(nf4.dynamic(), np.float32)
    return out


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a tiny model whose linear modules are quantized."""

    def make(
        kind: str = "llama",
        task: str = "causal_lm",
        *,
        double: bool = True,
        skip: str = "no",
        then: Change | None = None,
        sizes: Any = (),
        **config: Any,
    ) -> Path:
        def weights(tensors: Tensors) -> None:
            for name in list(tensors):
                if re.fullmatch(LINEAR, name) and not re.search(
                    skip + "$", name.removesuffix(".weight")
                ):
                    tensors |= packed(name, tensors.pop(name), double)
            if then is not None:
                then(tensors)

        target = tmp_path / f"quantized{len(list(tmp_path.iterdir()))}"
        settings = {"quantization_config": CONFIG | config}
        return edited(
            reference(kind, task, **dict(sizes)).folder,
            target,
            weights,
            lambda c: c.update(settings),
        )

    return make


def second(params: Any) -> Any:
    """Return the leaves of `q_proj` of the second layer."""
    layers = params["model"]["layers"]
    if "1" in layers:
        return layers["1"]["self_attn"]["q_proj"]
    return jax.tree.map(lambda leaf: leaf[1], layers["self_attn"]["q_proj"])


@both
@pytest.mark.parametrize(
    ("kind", "task"), [("llama", "causal_lm"), ("bert", "sequence_classification")]
)
@pytest.mark.representatives("llama-causal_lm-scanned", "bert-*")
def test_it_is_loaded_as_the_model_that_is_quantized_on_the_way(
    reference: Any, folder: Any, scan: bool, kind: str, task: Any
) -> None:
    _, wanted = jaxpeft.load(reference(kind, task).folder, task=task, scan_layers=scan, quant="nf4")
    for quant in (None, "nf4"):
        model, params = jaxpeft.load(folder(kind, task), task=task, scan_layers=scan, quant=quant)
        assert_bit_equal(params, wanted)
        assert model.options.quant == jaxpeft.Quant("nf4")


@pytest.mark.slow
@both
def test_without_double_quantization_the_scales_are_those_of_the_file(
    reference: Any, folder: Any, scan: bool
) -> None:
    model, params = jaxpeft.load(folder(double=False), task="causal_lm", scan_layers=scan)
    plain, base = jaxpeft.load(
        reference("llama", "causal_lm").folder, task="causal_lm", scan_layers=scan
    )
    _, twice = jaxpeft.load(folder(), task="causal_lm", scan_layers=scan)
    held = jaxpeft.dequantize(params)
    leaves, kernel, original = second(params), second(held)["kernel"], second(base)["kernel"]
    absmax = leaves["kernel_nf4_absmax"]
    assert absmax.dtype == np.float32 and absmax.shape == (
        32 * 32 // 64,
    )  # 64 does not divide 32 inputs
    codes = np.asarray(nf4.CODES, np.float32)[np.asarray(nf4.unpack(leaves["kernel_nf4"]))]
    np.testing.assert_array_equal(
        np.asarray(kernel).T, codes * np.repeat(absmax, 64).reshape(32, 32)
    )
    np.testing.assert_array_equal(absmax, np.abs(nf4.blocks_of(original)).max(axis=1))
    assert count(params) == count(twice) == count(base)
    np.testing.assert_allclose(run(model, params), run(plain, held), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_what_is_left_as_it_is_is_recorded(folder: Any) -> None:
    model, params = jaxpeft.load(folder(skip=r"(0\.mlp\.\w+|v_proj)"), task="causal_lm")
    names = tuple(f"model.layers.0.mlp.{name}_proj" for name in ("down", "gate", "up"))
    how = jaxpeft.Quant("nf4", exclude=(*names, "v_proj"))
    assert model.options.quant == how
    kernels = {paths.text(path[:-1]) for path, _ in paths.walk(params) if path[-1] == "kernel"}
    layers = {f"model/layers/{i}/self_attn/v_proj" for i in (0, 1)}
    assert kernels == {*(name.replace(".", "/") for name in names), *layers, "lm_head"}
    assert how.sites(jaxpeft.dequantize(params)).keys() == {
        (*path[:-1], "kernel") for path, _ in paths.walk(params) if path[-1] == "kernel_nf4"
    }


@pytest.mark.slow
def test_a_head_that_is_quantized_is_read_too(folder: Any) -> None:
    def head(tensors: Tensors) -> None:
        tensors |= packed("lm_head.weight", tensors.pop("lm_head.weight"), double=True)

    model, params = jaxpeft.load(folder(then=head), task="causal_lm")
    assert "kernel_nf4" in params["lm_head"]
    assert model.options.quant.sites(jaxpeft.dequantize(params)).keys() >= {("lm_head", "kernel")}
    _, others = jaxpeft.load(folder(then=head), task="sequence_classification", num_labels=2)
    assert set(others["score"]) == {"kernel"}


def test_codes_held_as_numbers_of_another_dtype_are_the_same(folder: Any) -> None:
    def wide(tensors: Tensors) -> None:
        tensors[Q] = tensors[Q].reshape(-1).view(np.float16).reshape(-1, 1)

    _, wanted = jaxpeft.load(folder(), task="causal_lm")
    _, params = jaxpeft.load(folder(then=wide, bnb_4bit_quant_storage="float16"), task="causal_lm")
    assert_bit_equal(params, wanted)


def test_it_is_loaded_onto_many_devices(folder: Any) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    _, alone = jaxpeft.load(folder(), task="causal_lm")
    for spec in (PartitionSpec(), PartitionSpec(None)):
        _, params = jaxpeft.load(folder(), task="causal_lm", sharding=NamedSharding(mesh, spec))
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
        assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, alone))


def state(**changes: Any) -> Change:
    def change(tensors: Tensors) -> None:
        tensors[STATE] = text(json.loads(tensors[STATE].tobytes()) | changes)

    return change


def cut(name: str) -> Change:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


def moved(tensors: Tensors) -> None:
    tensors[f"{Q}.quant_map"][3] += 0.01


BROKEN: list[tuple[Change, str]] = [
    (lambda t: t.pop(STATE), f"missing: {STATE}"),
    (lambda t: t.pop(Q), f"missing: {Q}"),
    (lambda t: t.pop(f"{Q}.absmax"), f"missing: {Q}.absmax"),
    (lambda t: t.pop(f"{Q}.nested_absmax"), f"missing: {Q}.nested_absmax"),
    (cut(Q), f"misshaped: {Q} has 511 bytes, must have 512 for [32, 32] in nf4"),
    (cut(f"{Q}.absmax"), f"misshaped: {Q}.absmax is uint8 [15], must be uint8 [16]"),
    (moved, f"quantized: {Q}.quant_map is not the table of nf4; load the unquantized model"),
    (state(shape=[16, 64]), f"misshaped: {Q} is [16, 64], must be [32, 32]"),
    (state(shape=[32.0, 32]), f"quantized: {Q}: shape is [32.0, 32], must be [out, in]"),
    (
        state(shape=[32, 31]),
        f"quantized: {Q}: shape is [32, 31], but nf4 needs an even number of inputs",
    ),
    (
        state(blocksize=128),
        (
            f"quantized: {Q}: blocksize is 128, must be 64; load the unquantized model with"
            " quant='nf4'"
        ),
    ),
    (state(nested_blocksize=64), f"quantized: {Q}: nested_blocksize is 64, must be 256"),
    (state(nested_offset=None), f"quantized: {Q}: nested_offset is None, must be a number"),
    (
        state(dtype="int8"),
        f"quantized: {Q}: dtype is 'int8', must be one of float32, float16, bfloat16",
    ),
    (
        state(dtype=["float16"]),
        f"quantized: {Q}: dtype is ['float16'], must be one of float32, float16, bfloat16",
    ),
    (state(nested_offset=10**400), f"quantized: {STATE} is not a valid bitsandbytes state"),
    (state(nested_offset=True), f"quantized: {Q}: nested_offset is True, must be a number"),
    (state(shape=[10**200, 10**200]), f"quantized: {Q}: shape is [1000"),
    (
        lambda t: t.update(
            {STATE: np.frombuffer(b'{"blocksize": ' + b"1" * 5000 + b"}", np.uint8)}
        ),
        f"quantized: {STATE} is not a valid bitsandbytes state",
    ),
    (
        lambda t: t.update({STATE: text({})[:-1]}),
        f"quantized: {STATE} is not a valid bitsandbytes state",
    ),
    (
        lambda t: t.update({STATE.replace("nf4", "fp4"): t.pop(STATE)}),
        f"quantized: {Q} is fp4, but only nf4 is supported",
    ),
]


@pytest.mark.parametrize(("change", "wanted"), BROKEN)
def test_what_does_not_fit_is_told_before_anything_large_is_read(
    folder: Any, monkeypatch: pytest.MonkeyPatch, change: Change, wanted: str
) -> None:
    broken = folder(then=change)
    monkeypatch.setattr(jax, "make_array_from_callback", None)
    with pytest.raises(
        WeightsError, match=r"the weights do not fit the model in config.json \(1 problems\)"
    ) as caught:
        jaxpeft.load(broken, task="causal_lm")
    assert caught.value.problems[1].startswith(wanted)


def test_a_packed_embedding_of_fewer_tokens_is_refused_first(folder: Any) -> None:
    def change(tensors: Tensors) -> None:
        tensors.update(
            packed("model.embed_tokens.weight", tensors["model.embed_tokens.weight"][:98], True)
        )

    with pytest.raises(
        JaxpeftError,
        match=r"vocab_size is 99, but there are only 98 in model\.embed_tokens\.weight",
    ):
        jaxpeft.load(folder(then=change), task="causal_lm")


def test_everything_that_does_not_fit_is_told_at_once(folder: Any) -> None:
    def change(tensors: Tensors) -> None:
        tensors.pop(f"{Q}.absmax")
        tensors.pop("model.norm.weight")
        tensors[f"{Q.replace('q_proj', 'o_proj')}.quant_map"] *= 2

    with pytest.raises(WeightsError, match=r"\(3 problems\)"):
        jaxpeft.load(folder(then=change), task="causal_lm")


def test_layers_that_differ_are_not_stacked(folder: Any) -> None:
    path = folder(skip=r"1\.mlp\.up_proj")
    with pytest.raises(
        WeightsError,
        match=(
            r"quantized: model\.layers\.0\.mlp\.up_proj\.weight: 1 of the 2 layers .*"
            r" scan_layers=False"
        ),
    ):
        jaxpeft.load(path, task="causal_lm", scan_layers=True)
    jaxpeft.load(path, task="causal_lm")


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (
            {"load_in_8bit": True, "load_in_4bit": False},
            "load_in_8bit is not supported; load the unquantized model with quant='int8'",
        ),
        (
            {"bnb_4bit_quant_type": "fp4"},
            (
                "bnb_4bit_quant_type 'fp4' is not supported; load the unquantized model with"
                " quant='nf4'"
            ),
        ),
        ({"load_in_4bit": False}, "only load_in_4bit of bitsandbytes is supported"),
        ({"quant_method": "gptq"}, "is not supported: load the unquantized model"),
    ],
)
def test_other_quantized_checkpoints_are_refused(folder: Any, config: Any, wanted: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization_config: .*{re.escape(wanted)}"):
        jaxpeft.load(folder(**config), task="causal_lm")


def test_what_contradicts_the_files_is_refused(folder: Any, reference: Any, tmp_path: Path) -> None:
    path = folder()
    with pytest.raises(
        ConfigError,
        match=r"quant: is 'int8', but .* is already quantized, as 'nf4'; omit quant",
    ):
        jaxpeft.load(path, task="causal_lm", quant="int8")
    with pytest.raises(ConfigError, match="is already quantized"):
        jaxpeft.load(path, task="causal_lm", quant=jaxpeft.Quant("nf4", exclude=("q_proj",)))
    plain = edited(
        reference("llama", "causal_lm").folder,
        tmp_path / "plain",
        None,
        lambda c: c.update(quantization_config=CONFIG),
    )
    with pytest.raises(
        WeightsError,
        match=(r"config\.json has a quantization_config, but no tensor is quantized"),
    ):
        jaxpeft.load(plain, task="causal_lm")


@pytest.mark.slow
def test_an_adapter_is_trained_saved_and_merged(
    folder: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = folder()
    model, base = jaxpeft.load(path, task="causal_lm")
    method = jaxpeft.LoRA(rank=2)
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    assert json.loads((tmp_path / "adapter" / "jaxpeft.json").read_text())["quant"] == {
        "form": "nf4",
        "targets": "all-linear",
        "exclude": [],
        "group": None,
    }
    wanted = run(model, params)
    for to in ("merged", "merged_quantized_reference"):
        export(ExportRequest(tmp_path / "adapter", to, tmp_path / to))
        assert "quantization_config" not in json.loads((tmp_path / to / "config.json").read_text())
        assert (
            json.loads((tmp_path / to / "jaxpeft_merge.json").read_text())["base_rounded_to"]
            == "nf4"
        )
        plain, merged = jaxpeft.load(tmp_path / to, task="causal_lm")
        assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype("float32")}
        np.testing.assert_allclose(run(plain, merged), wanted, rtol=1e-4, atol=1e-4)
    assert "is not rounded" not in caplog.text
    export(ExportRequest(tmp_path / "adapter", "peft", tmp_path / "peft"))
    with pytest.raises(ConfigError, match="merge into the unquantized base"):
        jaxpeft.merge(method, params)


def test_loftq_has_nothing_to_make_up_for(folder: Any) -> None:
    from jaxpeft.train.data_start import Start

    path = folder()
    model, base = jaxpeft.load(path, task="causal_lm")
    with pytest.raises(ConfigError, match="contains a quantized model, not its original kernels"):
        Start(model, base, jax.random.key(0)).original_kernels()


@pytest.mark.parametrize("double", [True, False])
def test_what_the_real_library_saves_is_what_it_computes_with(
    reference: Any, folder: Any, double: bool
) -> None:
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed"
    )
    import torch
    from safetensors.numpy import load_file

    # its program for CPUs decodes wrongly where 64 does not divide the inputs
    sizes = {"hidden_size": 64, "intermediate_size": 128}
    plain, wanted = (
        load_file(reference("llama", "causal_lm", **sizes).folder / "model.safetensors"),
        {},
    )

    def save(tensors: Tensors) -> None:
        for name in [name for name in plain if re.fullmatch(LINEAR, name)]:
            weight = torch.from_numpy(plain[name])
            data, held = functional.quantize_4bit(
                weight, blocksize=64, compress_statistics=double, quant_type="nf4"
            )
            tensors |= {
                f"{name}.{key}": value.numpy() for key, value in held.as_dict(packed=True).items()
            }
            tensors[name] = data.numpy()
            wanted[name] = functional.dequantize_4bit(data, held).numpy()

    _, params = jaxpeft.load(folder(skip="", then=save, sizes=sizes), task="causal_lm")
    held = jaxpeft.dequantize(params)
    for name, weight in wanted.items():
        kernel = paths.get(held, (*name.split(".")[:-1], "kernel"))
        assert np.abs(np.asarray(kernel).T - plain[name]).max() < 0.16 * np.abs(plain[name]).max()
        np.testing.assert_allclose(np.asarray(kernel).T, weight, rtol=1e-6, atol=1e-7)
    assert len(wanted) == 14
