"""Bottleneck adapters' own: where they stand, what they compute there, and on modules of others."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.methods.bottleneck import NonLinearity
from jaxpeft.methods.compacter import kronecker
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.layers import LayerNorm, ResidualDense
from tests.conformance.conftest import moved
from tests.core.helpers import load, names, run

RNG = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


class Sublayer(nn.Module):
    """A projection that joins a residual stream behind dropout, and may be normalized there."""

    normed: bool

    @nn.compact
    def __call__(self, x: Any, residual: Any) -> Any:
        proj = ResidualDense(8, name="o_proj")
        norm = LayerNorm(1e-5, jnp.float32, name="norm") if self.normed else None
        return proj.join(proj(x), residual, norm)


def adapted(model: Any, method: Any, *args: Any) -> Any:
    base = model.init(jax.random.key(1), *args)["params"]
    params = jaxpeft.rewrite(
        method, base, jax.random.key(0), sites=jaxpeft.find_sites(model, base, *args)
    )
    return jax.tree.map(
        lambda leaf: leaf + 0.3 * random(*leaf.shape) if leaf.ndim else leaf, params
    )


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer", "parallel"])
def test_the_formula_of_each_placement(placement: Any, normed: bool) -> None:
    x, residual, model = random(2, 5, 6), random(2, 5, 8), Sublayer(normed)
    method = jaxpeft.Adapter(
        placement=placement,
        targets=("o_proj",),
        reduction_factor=3,
        scaling=2.0,
        non_linearity="tanh",
    )
    params = adapted(model, method, x, residual)
    own = params["o_proj"]

    def n(value: Any) -> Any:
        return (
            LayerNorm(1e-5, jnp.float32).apply({"params": params["norm"]}, value)
            if normed
            else value
        )

    h = x @ own["kernel"] + own["bias"]
    z = {"houlsby": h, "pfeiffer": n(residual + h), "parallel": residual}[placement]
    inner = jnp.tanh(z @ own["adapter_down"] + own["adapter_down_bias"])
    assert own["adapter_down"].shape == (8, 2)
    wanted = n(residual + h + 2.0 * (inner @ own["adapter_up"] + own["adapter_up_bias"]))
    np.testing.assert_allclose(jaxpeft.apply(model, params, x, residual), wanted, atol=1e-5)


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.DenseGeneral((2, 4), name="out")(nn.Dense(6, name="mid")(x))


@pytest.mark.slow
def test_a_module_that_joins_nothing_is_adapted_on_its_output_alone() -> None:
    x, model = random(3, 5), Plain()
    params = adapted(
        model, jaxpeft.Adapter(placement="houlsby", targets=("mid", "out"), reduction_factor=2), x
    )

    def network(own: Any, h: Any) -> Any:
        inner = jax.nn.relu(h @ own["adapter_down"] + own["adapter_down_bias"])
        return h + inner @ own["adapter_up"] + own["adapter_up_bias"]

    mid, out = params["mid"], params["out"]
    h = network(mid, x @ mid["kernel"] + mid["bias"])
    wanted = network(out, (h @ out["kernel"].reshape(6, 8)) + out["bias"].reshape(8)).reshape(
        3, 2, 4
    )
    np.testing.assert_allclose(jaxpeft.apply(model, params, x), wanted, atol=1e-5)


@pytest.mark.parametrize("placement", ["pfeiffer", "parallel"])
def test_a_placement_that_reads_the_residual_stream_is_refused_where_there_is_none(
    placement: Any,
) -> None:
    x, model = random(3, 5), Plain()
    params = adapted(model, jaxpeft.Adapter(placement=placement, targets=("mid",)), x)
    with pytest.raises(
        ConfigError,
        match=f"placement '{placement}' needs the residual stream.*use placement 'houlsby'",
    ):
        jaxpeft.apply(model, params, x)


@pytest.mark.parametrize(
    ("kind", "options", "wanted"),
    [
        ("bert", {}, {"output/dense"}),
        ("bert", {"placement": "houlsby"}, {"attention/output/dense", "output/dense"}),
        ("bert", {"sublayers": "attention"}, {"attention/output/dense"}),
        ("bert", {"sublayers": "both", "exclude": ("attention.output.dense",)}, {"output/dense"}),
        ("bert", {"exclude": r".*\.0\.output\.dense"}, {"output/dense"}),
        ("llama", {}, {"mlp/down_proj"}),
        (
            "llama",
            {"placement": "parallel", "sublayers": "both"},
            {"self_attn/o_proj", "mlp/down_proj"},
        ),
    ],
)
def test_the_usual_sites(kind: str, options: dict[str, Any], wanted: set[str]) -> None:
    method = jaxpeft.Adapter(**options)
    params = jaxpeft.rewrite(method, load(kind)[1], jax.random.key(0))
    found = names(params, "adapter_down")
    assert {
        name.partition("/1/")[2].removesuffix("/adapter_down") for name in found if "/1/" in name
    } == wanted
    assert any("/0/" in name for name in found) == (not isinstance(method.exclude, str))


LAST = jaxpeft.Adapter(
    placement="houlsby", layers_to_transform=(1,), non_linearity="sigmoid", scaling="learned"
)


@pytest.mark.slow
def test_a_fresh_adapter_in_some_layers_of_a_stack_changes_no_bit() -> None:
    model, base = load("bert", scan_layers=True)
    fresh = jaxpeft.rewrite(LAST, base, jax.random.key(0))
    with jax.disable_jit():  # op by op: XLA fuses the two programs differently
        np.testing.assert_array_equal(run(model, fresh), run(model, base))


@pytest.mark.slow
def test_some_layers_of_a_stack_compute_as_unrolled_and_the_others_as_the_base() -> None:
    method = LAST
    (model, base), (plain_model, plain) = load("bert", scan_layers=True), load("bert")
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    node = params["bert"]["encoder"]["layer"]["output"]["dense"]
    assert not np.asarray(node["adapter_up_bias"])[0].any()
    unrolled = moved(method, jaxpeft.rewrite(method, plain, jax.random.key(0)))
    own = {name: leaf[1] for name, leaf in node.items() if name.startswith("adapter_")}
    assert own.keys() == {
        key
        for key in unrolled["bert"]["encoder"]["layer"]["1"]["output"]["dense"]
        if "adapter_" in key
    }
    np.testing.assert_allclose(
        run(model, params), run(plain_model, jaxpeft.unstack_layers(params)), atol=1e-5
    )

    def loss(trained: Any) -> Any:
        return jnp.sum(
            jnp.square(jaxpeft.apply(model, {**params, "bert": trained}, jnp.arange(4, 8)[None]))
        )

    grads = jax.jit(jax.grad(loss))(params["bert"])["encoder"]["layer"]["output"]["dense"]
    for key in ("adapter_down", "adapter_up", "adapter_up_bias", "adapter_gain"):
        assert not np.asarray(grads[key])[0].any(), key
        assert np.asarray(grads[key])[1].any(), key


@pytest.mark.slow
def test_dropout_is_on_what_the_adapter_gives() -> None:
    x, model = random(4, 50, 5), Plain()
    params = adapted(model, jaxpeft.Adapter(placement="houlsby", targets=("mid",), dropout=0.5), x)
    plain = jaxpeft.apply(model, params, x)
    mid = {
        "mid": params["mid"],
        "out": {"kernel": jnp.eye(8)[:6].reshape(6, 2, 4), "bias": jnp.zeros((2, 4))},
    }
    base = x @ params["mid"]["kernel"] + params["mid"]["bias"]
    whole = jaxpeft.apply(model, mid, x).reshape(4, 50, 8)[..., :6] - base
    some = (
        jaxpeft.apply(model, mid, x, rngs={"dropout": jax.random.key(3)}).reshape(4, 50, 8)[..., :6]
        - base
    )
    kept = np.abs(some) > 1e-6
    assert 0.4 < kept.mean() < 0.6
    np.testing.assert_allclose(
        np.asarray(some)[kept], 2 * np.asarray(whole)[kept], rtol=1e-3, atol=1e-5
    )
    np.testing.assert_array_equal(plain, jaxpeft.apply(model, params, x))


@pytest.mark.slow
def test_every_row_has_an_adapter_of_its_own() -> None:
    model, base = load("bert", task="encoder", scan_layers=True)
    method = jaxpeft.Adapter(placement="parallel", reduction_factor=4)
    first, second = (
        moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)), seed=seed)
        for seed in (1, 2)
    )
    bank = jaxpeft.bank([(method, first), (method, second)])
    ids = jnp.arange(4, 16, dtype=jnp.int32).reshape(2, 6)
    outputs = jax.jit(lambda adapter: jaxpeft.apply(model, bank, ids, adapter=adapter))
    rows = outputs(jnp.asarray([1, 0]))
    one, other = outputs(jnp.asarray(1)), outputs(jnp.asarray(0))
    np.testing.assert_allclose(rows, jnp.stack([one[0], other[1]]), atol=1e-5)


def test_the_non_linearities_are_those_that_the_models_have() -> None:
    assert set(get_args(NonLinearity)) <= ACTIVATIONS.keys()


def test_kronecker_products() -> None:
    rule, left, right = random(4, 4, 4), random(4, 3, 2), random(4, 2, 5)
    wanted = sum(np.kron(rule[i], np.asarray(left[i]) @ np.asarray(right[i])) for i in range(4))
    np.testing.assert_allclose(kronecker(rule, left, right), wanted, atol=1e-5)


def test_widths_that_the_rule_does_not_divide_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=(
            r"phm_dim: 4 does not divide both the width 32 of .*down_proj and its bottleneck's, 6"
        ),
    ):
        jaxpeft.rewrite(jaxpeft.Compacter(reduction_factor=5), load("llama")[1], jax.random.key(0))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sublayers": "both", "targets": ("o_proj",)}, "sublayers: needs targets 'default'"),
        ({"reduction_factor": 0}, "reduction_factor: must be above 0"),
        ({"scaling": "trained"}, "scaling: must be a number or one of 'learned', 'channel'"),
        ({"non_linearity": "prelu"}, "non_linearity: must be one of 'relu'"),
        ({"placement": "behind"}, "placement: must be one of 'houlsby', 'pfeiffer', 'parallel'"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        jaxpeft.Adapter(**options)


def test_a_model_without_the_usual_sites_is_refused() -> None:
    with pytest.raises(TargetError, match="the model has none of the default sites of adapter"):
        jaxpeft.rewrite(
            jaxpeft.Adapter(),
            Plain().init(jax.random.key(0), random(3, 5))["params"],
            jax.random.key(0),
        )


def test_an_adapter_that_begins_random_says_that_it_is_not_the_base() -> None:
    assert jaxpeft.Adapter().fresh_is_base
    for begin in ("bert", "houlsby"):
        method = jaxpeft.Adapter(init_weights=begin)
        assert not method.fresh_is_base
        assert dataclasses.replace(method, init_weights="lora").fresh_is_base
        node = jaxpeft.rewrite(method, load("llama")[1], jax.random.key(0))["model"]["layers"]["0"][
            "mlp"
        ]["down_proj"]
        assert 0.001 < float(jnp.abs(node["adapter_up"]).max()) < 0.1
