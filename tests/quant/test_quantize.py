"""Quantized trees: as they are loaded and as they are made of plain ones, which kernels, and what
does not fit.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.tree import count
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.kernels import QUANTIZED
from jaxpeft.train import flops
from tests.core.helpers import load, run
from tests.hub.helpers import assert_bit_equal

every_form = pytest.mark.parametrize("form", QUANTIZED)
both = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])


@pytest.mark.slow
@both
@every_form
@pytest.mark.representatives("fp8-unrolled")
def test_a_model_that_is_loaded_quantized_is_the_one_that_is_quantized_later(
    reference: Any,
    form: Any,
    scan: bool,
) -> None:
    folder = reference("llama", "causal_lm", intermediate_size=64).folder
    model, plain = jaxpeft.load(folder, task="causal_lm", scan_layers=scan)
    quantized, params = jaxpeft.load(folder, task="causal_lm", scan_layers=scan, quant=form)
    assert_bit_equal(params, jaxpeft.quantize(plain, form))
    assert quantized.options.quant == jaxpeft.Quant(form) and model.options.quant is None
    held = {path[-1] for path, _ in paths.walk(params)}
    assert {"embedding", "scale", *QUANTIZED[form].leaves} == held - {"kernel"}
    assert [path for path, _ in paths.walk(params) if path[-1] == "kernel"] == [
        ("lm_head", "kernel")
    ]
    assert count(params) == count(plain)
    assert flops.per_token({}, params) == flops.per_token({}, plain)
    np.testing.assert_allclose(
        run(quantized, params), run(model, jaxpeft.dequantize(params)), rtol=1e-4, atol=1e-4
    )


@both
def test_of_the_kernels_one_is_there_at_a_time(
    reference: Any, scan: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, most = reference("llama", "causal_lm").folder, [0]
    plain = jax.make_array_from_single_device_arrays

    def watched(shape: Any, *rest: Any, **options: Any) -> Any:
        made = plain(shape, *rest, **options)
        most[0] = max(most[0], there())
        return made

    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", watched)
    before = there()
    jaxpeft.load(folder, task="causal_lm", scan_layers=scan, quant="nf4")
    assert most[0] - before <= max(rows * columns for rows, columns in SHAPES)


def there() -> int:
    """Count the numbers of all kernels that are there now; two arrays of one buffer are one."""
    alone = [
        a
        for a in jax.live_arrays()
        if a.ndim >= 2 and a.dtype == jnp.float32 and len(a.devices()) == 1
    ]
    return sum(
        {a.unsafe_buffer_pointer(): a.size for a in alone if a.shape[-2:] in SHAPES}.values()
    )


SHAPES = [(32, 32), (32, 16), (32, 48), (48, 32)]
"""Of the kernels of the tiny Llama's layers."""


def test_a_quantized_model_is_loaded_onto_many_devices(reference: Any) -> None:
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    folder = reference("llama", "causal_lm").folder
    _, alone = jaxpeft.load(folder, task="causal_lm", quant="nf4")
    _, params = jaxpeft.load(
        folder, task="causal_lm", quant="nf4", sharding=NamedSharding(mesh, PartitionSpec())
    )
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(params)} == {8}
    assert_bit_equal(jax.tree.map(np.asarray, params), jax.tree.map(np.asarray, alone))


@both
def test_targets_say_which_and_groups_how(scan: bool) -> None:
    _, base = load("llama", scan_layers=scan)
    params = jaxpeft.quantize(
        base, jaxpeft.Quant("int8", targets=("q_proj", "down_proj"), exclude=("q_proj",), group=16)
    )
    held = {path[-2] for path, _ in paths.walk(params) if path[-1] == "kernel_int8"}
    assert held == {"down_proj"}
    shapes = {
        leaf.shape[-2:] for path, leaf in paths.walk(params) if path[-1] == "kernel_int8_scale"
    }
    assert shapes == {(32, 3)}


def test_what_does_not_fit_is_refused(reference: Any) -> None:
    _, base = load("llama")
    _, stacked = load("llama", scan_layers=True)
    with pytest.raises(
        ConfigError,
        match=r"quant: 'nf3' is not a number format \(known: nf4, int4, int8, fp8, mxfp4\)",
    ):
        jaxpeft.quantize(base, "nf3")
    with pytest.raises(
        ConfigError,
        match="quant_group: is 32, but nf4 has no groups; only int4 and int8 have",
    ):
        jaxpeft.Quant("nf4", group=32)
    with pytest.raises(
        ConfigError, match=r"quant_group: 7 does not divide the 32 inputs of model\.layers\.0\."
    ):
        jaxpeft.quantize(base, jaxpeft.Quant("int4", group=7))
    with pytest.raises(TargetError, match="'no_proj'"):
        jaxpeft.quantize(base, jaxpeft.Quant("int4", targets=("no_proj",)))
    with pytest.raises(
        ConfigError,
        match=r"1 of the 2 stacked layers of model\.layers\.0\.mlp\.up_proj are selected",
    ):
        jaxpeft.quantize(stacked, jaxpeft.Quant("int4", targets=("0.mlp.up_proj",)))
    odd = {"layers": {"0": {"proj": {"kernel": jnp.zeros((3, 4))}}}}
    with pytest.raises(
        ConfigError,
        match=r"layers\.0\.proj has 3 inputs, but nf4 needs an even number; exclude it",
    ):
        jaxpeft.quantize(odd, "nf4")
    folder = reference("llama", "causal_lm").folder
    with pytest.raises(
        ConfigError,
        match=(
            "quant: lm_head is to be quantized, but vocab_size=120 adds tokens to it; exclude it"
        ),
    ):
        jaxpeft.load(
            folder,
            task="causal_lm",
            vocab_size=120,
            quant=jaxpeft.Quant("int8", targets=("lm_head",)),
        )
    with pytest.raises(ConfigError, match="not a number format"):
        jaxpeft.load(reference("llama", "causal_lm").folder, task="causal_lm", quant="q4_k")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "("}, r"quant_targets: '\(' is not a regular expression"),
        ({"exclude": "[a"}, r"quant_exclude: '\[a' is not a regular expression"),
        ({"group": 2.0}, r"quant_group: must be an integer of at least 1, is 2\.0"),
        ({"group": 0}, "quant_group: must be an integer of at least 1, is 0"),
        ({"group": True}, "quant_group: must be an integer of at least 1, is True"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        jaxpeft.Quant("int8", **options)


@pytest.mark.slow
def test_lists_are_taken_and_what_is_excluded_in_vain_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, base = load("llama", scan_layers=False)
    listed: Any = ["q_proj", "k_proj"]
    assert jaxpeft.Quant("nf4", targets=listed) == jaxpeft.Quant(
        "nf4", targets=("q_proj", "k_proj")
    )
    jaxpeft.quantize(base, jaxpeft.Quant("int8", exclude=("k_proj",)))
    assert not caplog.records
    jaxpeft.quantize(base, jaxpeft.Quant("int8", exclude=("qproj", "k_proj")))
    assert (
        "quant_exclude: 'qproj' matches no linear module of this model; did you mean 'q_proj'"
        in caplog.text
    )
    jaxpeft.quantize(base, jaxpeft.Quant("int8", exclude=r".*no_such"))
    assert "quant_exclude: '.*no_such' matches no linear module" in caplog.text


@every_form
@pytest.mark.representatives("int8")
def test_training_moves_the_adapter_and_no_bit_of_the_base(reference: Any, form: Any) -> None:
    folder = reference("llama", "causal_lm", intermediate_size=64).folder
    model, base = jaxpeft.load(folder, task="causal_lm", scan_layers=True)
    method = jaxpeft.LoRA(rank=2)
    params = jaxpeft.rewrite(method, jaxpeft.quantize(base, form), jax.random.key(0))
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    ids = jnp.asarray([[1, 2, 3, 4]])

    def loss(trainable: Any) -> Any:
        return jnp.mean(jnp.square(jaxpeft.apply(model, jaxpeft.combine(trainable, frozen), ids)))

    grads = jax.jit(jax.grad(loss))(trainable)
    assert {path[-1] for path, _ in paths.walk(grads)} == {"lora_a", "lora_b"}
    assert all(np.abs(g).max() > 0 for path, g in paths.walk(grads) if path[-1] == "lora_b")


def test_it_is_written_as_it_is_given() -> None:
    assert str(jaxpeft.Quant("nf4")) == "'nf4'"
    how = jaxpeft.Quant("int4", exclude=("pooler.dense",), group=32)
    assert eval(str(how), {"jaxpeft": jaxpeft}) == how


@pytest.mark.parametrize("targets", [3, ("q_proj", 1), {"q_proj": 1}])
def test_targets_that_are_no_strings_are_refused(targets: Any) -> None:
    with pytest.raises(ConfigError, match="quant_targets: must be a string or a list of strings"):
        jaxpeft.Quant("nf4", targets)
