"""Modules that jaxpeft did not write: Linen and NNX, every type of linear module, under scan, remat
and vmap.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, TargetError

RNG = np.random.default_rng(0)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def moved(method: Any, params: Any) -> Any:
    rng = np.random.default_rng(1)
    names = method.leaves.trained
    return paths.map_with_path(
        lambda path, x: (
            x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) if path[-1] in names else x
        ),
        params,
    )


def assert_close(found: Any, wanted: Any) -> None:
    """Two results are the same but for rounding, which is of their largest numbers."""
    np.testing.assert_allclose(
        found, wanted, rtol=1e-4, atol=2e-4 + 2e-5 * float(np.abs(wanted).max())
    )


METHODS = [
    jaxpeft.LoRA(rank=2),
    jaxpeft.DoRA(rank=2),
    jaxpeft.OFT(block_size=2),
    jaxpeft.IA3(targets=("m",), feedforward=()),
]


class One(nn.Module):
    """Holds one module of somebody's."""

    make: Any

    @nn.compact
    def __call__(self, *args: Any) -> Any:
        return self.make(name="m")(*args)


LINEN = {
    "Dense": (lambda name: nn.Dense(6, name=name), (4, 8)),
    "DenseGeneral out": (lambda name: nn.DenseGeneral((2, 3), name=name), (4, 8)),
    "DenseGeneral in": (lambda name: nn.DenseGeneral(6, axis=(-2, -1), name=name), (4, 2, 4)),
    "DenseGeneral middle": (
        lambda name: nn.DenseGeneral((2, 3), axis=(1, 3), name=name),
        (4, 2, 5, 4),
    ),
    "Einsum": (
        lambda name: nn.Einsum((2, 8, 4), "btd,ndh->btnh", name=name, use_bias=True),
        (3, 5, 8),
    ),
    "Einsum back": (
        lambda name: nn.Einsum((2, 4, 8), "btnh,nhd->btd", name=name, use_bias=False),
        (3, 5, 2, 4),
    ),
    "Einsum turned": (
        lambda name: nn.Einsum((2, 8, 4), "btd,ndh->nhtb", name=name, use_bias=False),
        (3, 5, 8),
    ),
    "Conv 1": (lambda name: nn.Conv(6, (3,), name=name), (2, 9, 4)),
    "Conv 1 causal": (
        lambda name: nn.Conv(6, (3,), padding="CAUSAL", kernel_dilation=2, name=name),
        (2, 9, 4),
    ),
    "Conv 2": (lambda name: nn.Conv(6, (3, 2), strides=2, name=name), (2, 8, 9, 4)),
    "Conv 2 valid": (
        lambda name: nn.Conv(6, (3, 3), padding=[(1, 0), (2, 1)], name=name, use_bias=False),
        (2, 8, 9, 4),
    ),
    "Conv lone": (lambda name: nn.Conv(6, (3, 3), padding="VALID", name=name), (8, 9, 4)),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", LINEN)
@pytest.mark.representatives(
    "Dense-*",
    "Conv 1-lora",
    "Conv lone-lora",
    "Conv 2-dora",
    "DenseGeneral *-lora",
    "Einsum turned-oft",
    "Einsum back-lora",
    "Conv 1 causal-lora",
)
def test_every_linear_linen_module_computes_as_its_merged_kernel(name: str, method: Any) -> None:
    make, shape = LINEN[name]
    model, x = One(make), random(*shape)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    fresh = jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites)
    plain = model.apply({"params": base}, x)
    np.testing.assert_allclose(jaxpeft.apply(model, fresh, x), plain, atol=1e-4)
    params = moved(method, fresh)
    out = jax.jit(lambda p, x: jaxpeft.apply(model, p, x))(params, x)
    assert out.shape == plain.shape
    assert np.abs(out - plain).max() > 1e-2
    folded = jaxpeft.merge(method, params, sites=sites)
    assert_close(model.apply({"params": folded}, x), out)


class Normed(nn.Module):
    """A residual block of convolutions, with statistics."""

    @nn.compact
    def __call__(self, x: Any, *, train: bool) -> Any:
        y = nn.Conv(4, (3, 3), name="conv")(x)
        return x + jax.nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(y))


def test_a_module_with_statistics_computes_as_its_merged_kernel() -> None:
    model, x, method = Normed(), random(2, 6, 6, 4), jaxpeft.LoHa(rank=2)
    made = jax.jit(partial(model.init, train=True))(jax.random.key(0), x)
    base, rest = made["params"], {"batch_stats": {"norm": {"mean": random(4), "var": jnp.ones(4)}}}
    sites = jaxpeft.find_sites(model, base, x, variables=rest, train=False)
    assert [site.kind for site in sites].count("linear") == 1
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites)
    params = moved(method, fresh)
    run = jax.jit(lambda p: jaxpeft.apply(model, p, x, variables=rest, train=False))
    assert_close(run(jaxpeft.merge(method, params, sites=sites)), run(params))
    plain = jax.jit(partial(model.apply, train=False))({"params": base, **rest}, x)
    np.testing.assert_allclose(run(fresh), plain, atol=1e-5)
    assert np.abs(run(params) - plain).max() > 1e-2


def test_embeddings_are_adapted_and_tied_heads_compute_with_trained_tokens() -> None:
    class Tied(nn.Module):
        def setup(self) -> None:
            self.embed = nn.Embed(11, 4)

        def __call__(self, ids: Any) -> Any:
            return self.embed.attend(self.embed(ids))

    model, ids = Tied(), jnp.arange(6).reshape(2, 3)
    base = model.init(jax.random.key(0), ids)["params"]
    sites = jaxpeft.find_sites(model, base, ids)
    assert [(site.kind, site.shape) for site in sites] == [("embedding", (11, 4))]
    method = jaxpeft.TrainableTokens(tokens=(2, 9), targets=("embed",))
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites))
    folded = jaxpeft.merge(method, params, sites=sites)
    np.testing.assert_allclose(
        jaxpeft.apply(model, params, ids), model.apply({"params": folded}, ids), atol=1e-5
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        h = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(
            nn.LayerNorm(name="norm")(x)
        )
        return (
            x
            + nn.Dense(8, name="out")(
                jax.nn.gelu(nn.DenseGeneral((2, 8), name="up")(x + h).sum(-2))
            ),
            None,
        )


class Stack(nn.Module):
    lifted: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        if self.lifted:
            lift = nn.scan(
                nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return lift(name="stack")(x, None)[0]
        several = nn.vmap(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(None, None),
            axis_size=3,
        )
        return several(name="stack")(x, None)[0].sum(0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        jaxpeft.LoRA(rank=2),
        jaxpeft.LoRA(rank=2, targets=("query", "out", "up"), layers_to_transform=(1,)),
        jaxpeft.VeRA(rank=3),
    ],
    ids=["all", "one layer", "shared"],
)
@pytest.mark.parametrize("lifted", [True, False], ids=["scan of remat", "vmap"])
def test_multi_head_attention_under_scan_remat_and_vmap(lifted: bool, method: Any) -> None:
    model, x = Stack(lifted), random(2, 5, 8)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    kinds = {site.path[-1]: (site.kind, site.layers) for site in sites}
    assert kinds == dict.fromkeys(["query", "key", "value", "out", "up"], ("linear", (3,))) | {
        "norm": ("norm", (3,))
    }
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites))
    if getattr(method, "layers_to_transform", None):
        padded = params["stack"]["up"]["lora_a"]
        params["stack"]["up"]["lora_a"] = padded.at[0].set(0).at[2].set(0)
        for path in (("attention", "query"), ("attention", "out"), ("out",)):
            node = paths.get(params["stack"], path)
            node["lora_a"] = node["lora_a"].at[0].set(0).at[2].set(0)
    out = jax.jit(lambda p: jaxpeft.apply(model, p, x))(params)
    folded = jaxpeft.merge(method, params, sites=sites)
    assert_close(jax.jit(model.apply)({"params": folded}, x), out)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jaxpeft.apply(model, p, x) ** 2)))(params)
    trained = next(iter(method.leaves.trained - {"lora_bias"}))
    assert float(jnp.abs(grads["stack"]["up"][trained]).max()) > 0


def test_what_no_method_adapts_is_named() -> None:
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return x @ self.param("kernel", nn.initializers.ones, (8, 8))

    class Holder(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.Conv(6, (3,), feature_group_count=2, name="grouped")(
                Own(name="own")(nn.Dense(8, name="dense")(x))
            )

    model, x = Holder(), random(2, 9, 8)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    for target, kind in (("own", "Own"), ("grouped", "Conv")):
        with pytest.raises(
            TargetError,
            match=f"'{target}' matches {target}, which is a {kind} site; lora adapts linear and emb",
        ):
            jaxpeft.rewrite(jaxpeft.LoRA(targets=(target,)), base, jax.random.key(0), sites=sites)
    unseen = jaxpeft.rewrite(jaxpeft.LoRA(targets=("own",)), base, jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"lora cannot adapt a Own \(own\); exclude it from the targets"
    ):
        jaxpeft.apply(model, unseen, x)


@pytest.mark.slow
def test_layers_that_are_stacked_along_another_axis_are_refused() -> None:
    class Behind(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            scan = nn.scan(
                Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return scan(name="stack")(x, None)[0]

    model, x = Behind(), random(2, 5, 8)
    tree = model.init(jax.random.key(0), x)["params"]
    with pytest.raises(ConfigError, match=r"must be stacked along the first axis"):
        jaxpeft.find_sites(model, tree, x)


# ---------------------------------------------------------------------------------------------- NNX


class NnxOne(nnx.Module):
    def __init__(self, m: Any) -> None:
        self.m = m

    def __call__(self, *args: Any) -> Any:
        return self.m(*args)


NNX = {
    "Linear": (lambda r: nnx.Linear(8, 6, rngs=r), (4, 8)),
    "LinearGeneral out": (lambda r: nnx.LinearGeneral(8, (2, 3), rngs=r), (4, 8)),
    "LinearGeneral in": (lambda r: nnx.LinearGeneral((2, 4), 6, axis=(-2, -1), rngs=r), (4, 2, 4)),
    "Einsum": (lambda r: nnx.Einsum("btd,ndh->btnh", (2, 8, 4), (2, 4), rngs=r), (3, 5, 8)),
    "Conv": (lambda r: nnx.Conv(4, 6, (3, 3), strides=2, rngs=r), (2, 8, 9, 4)),
    "Conv 1": (lambda r: nnx.Conv(4, 6, 3, padding="CAUSAL", rngs=r), (2, 9, 4)),
}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("name", NNX)
@pytest.mark.representatives("*-lora", "Linear-*", "Conv-oft", "Einsum-dora")
def test_every_linear_nnx_module_computes_as_its_merged_kernel(name: str, method: Any) -> None:
    make, shape = NNX[name]
    model, x = NnxOne(make(nnx.Rngs(0))), random(*shape)
    base, before = jaxpeft.params_of(model), model(x)
    sites = jaxpeft.find_sites(model, base)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites))
    out = jax.jit(lambda p, x: jaxpeft.apply(model, p, x))(params, x)
    assert np.abs(out - before).max() > 1e-2
    folded = jaxpeft.merge(method, params, sites=sites)
    assert_close(jaxpeft.with_params(model, folded)(x), out)
    np.testing.assert_array_equal(model(x), before)  # the module that was given is as it was


class NnxLayer(nnx.Module):
    def __init__(self, rngs: Any) -> None:
        self.attention = nnx.MultiHeadAttention(2, 8, 8, decode=False, rngs=rngs)
        self.norm, self.out = nnx.LayerNorm(8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return x + self.out(jax.nn.gelu(self.attention(self.norm(x))))


class NnxStack(nnx.Module):
    def __init__(self, rngs: Any, scanned: bool) -> None:
        self.embed, self.scanned = nnx.Embed(11, 8, rngs=rngs), scanned
        if scanned:
            self.layers = nnx.vmap(NnxLayer, in_axes=0, out_axes=0)(rngs.split(3))
        else:
            self.layers = nnx.List([NnxLayer(rngs) for _ in range(3)])

    def __call__(self, ids: Any) -> Any:
        x = self.embed(ids)
        if not self.scanned:
            for layer in self.layers:
                x = layer(x)
            return x
        return nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )(x, self.layers)


@pytest.mark.slow
@pytest.mark.parametrize("scanned", [False, True], ids=["a list", "scan of remat"])
@pytest.mark.parametrize(
    "method",
    [jaxpeft.LoRA(rank=2, dropout=0.5), jaxpeft.DoRA(rank=2), jaxpeft.VeRA(rank=3)],
    ids=lambda m: m.name,
)
def test_nnx_attention_and_embeddings_in_lists_and_under_scan_and_remat(
    method: Any, scanned: bool
) -> None:
    model, ids = NnxStack(nnx.Rngs(0), scanned), jnp.arange(10).reshape(2, 5)
    base = jaxpeft.params_of(model)
    sites = jaxpeft.find_sites(model, base)
    assert {site.path[-1] for site in sites if site.kind == "linear"} == {
        "query",
        "key",
        "value",
        "out",
    }
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites))
    out = jaxpeft.apply(model, params, ids)
    assert np.abs(out - model(ids)).max() > 1e-2
    folded = jaxpeft.merge(method, params, sites=sites)
    assert_close(jaxpeft.with_params(model, folded)(ids), out)
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    grads = jax.jit(
        jax.grad(lambda t: jnp.sum(jaxpeft.apply(model, jaxpeft.combine(t, frozen), ids) ** 2))
    )(trainable)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
    if method.name == "lora":
        key = {"dropout": jax.random.key(3)}
        assert np.abs(jaxpeft.apply(model, params, ids, rngs=key) - out).max() > 1e-3


def test_an_nnx_embedding_is_adapted_and_a_foreign_leaf_is_refused() -> None:
    model, ids = NnxStack(nnx.Rngs(0), False), jnp.arange(10).reshape(2, 5)
    base = jaxpeft.params_of(model)
    sites = jaxpeft.find_sites(model, base)
    method = jaxpeft.LoRA(rank=2, targets=("embed",))
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(1), sites=sites))
    folded = jaxpeft.merge(method, params, sites=sites)
    np.testing.assert_allclose(
        jaxpeft.with_params(model, folded)(ids), jaxpeft.apply(model, params, ids), atol=1e-4
    )
    with pytest.raises(
        ConfigError, match="embed/lora_a is not a parameter of this module; merge the adapter first"
    ):
        jaxpeft.with_params(model, params)


# ------------------------------------------------------------------ stacks, names, and what is left


class Scanned(nn.Module):
    """Layers under a scan of any name."""

    called: str

    @nn.compact
    def __call__(self, x: Any) -> Any:
        block = nn.scan(Cell, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return block(name=self.called)(x, None)[0]


class Cell(nn.Module):
    @nn.compact
    def __call__(self, x: Any, _: Any) -> Any:
        return nn.tanh(nn.Dense(4, name="m")(x)), None


@pytest.mark.slow
@pytest.mark.parametrize("called", ["layers", "stack"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.representatives("3-stack")
def test_a_bank_of_scanned_layers_of_any_name(called: str, count: int) -> None:
    model, x, method = Scanned(called), random(3, 4), jaxpeft.LoRA(rank=2)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites)
    trees = [
        jax.tree.map(lambda leaf, i=i: leaf * (1 + i), moved(method, fresh)) for i in range(count)
    ]
    trees = [
        paths.map_with_path(
            lambda p, leaf: leaf if p[-1].startswith("lora_") else paths.get(base, p), t
        )
        for t in trees
    ]
    tree = jaxpeft.bank([(method, one) for one in trees], sites=sites)
    for i, alone in enumerate(trees):
        wanted = jaxpeft.apply(model, alone, x)
        np.testing.assert_allclose(
            jaxpeft.apply(model, tree, x, adapter=i), wanted, rtol=1e-5, atol=1e-6
        )
        picked = jaxpeft.pick(method, tree, i, sites=sites)
        np.testing.assert_allclose(jaxpeft.apply(model, picked, x), wanted, rtol=1e-5, atol=1e-6)


def test_a_stack_that_is_itself_called_layers() -> None:
    class Model(nnx.Module):
        def __init__(self) -> None:
            keys = jax.random.split(jax.random.key(0), 3)
            self.layers = nnx.vmap(lambda key: nnx.Linear(4, 4, rngs=nnx.Rngs(key)))(keys)

        def __call__(self, x: Any) -> Any:
            return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )

    model, method, x = Model(), jaxpeft.LoRA(rank=2), random(3, 4)
    base = jaxpeft.params_of(model)
    sites = jaxpeft.find_sites(model, base)
    assert [site.names for site in sites] == [("layers.0", "layers.1", "layers.2")]
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites))
    merged = jaxpeft.with_params(model, jaxpeft.merge(method, params, sites=sites))
    np.testing.assert_allclose(jaxpeft.apply(model, params, x), merged(x), rtol=1e-4, atol=1e-5)


class ByName(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Dense(8, name="m")(inputs=x)
        return nn.Einsum((8, 4), name="e")(x, einsum_str="bld,dh->blh")


class ByNameNnx(nnx.Module):
    def __init__(self) -> None:
        self.m = nnx.Linear(4, 8, rngs=nnx.Rngs(0))

    def __call__(self, x: Any) -> Any:
        return self.m(inputs=x)


def test_inputs_may_be_given_by_name() -> None:
    model, method, x = ByName(), jaxpeft.LoRA(rank=2), random(2, 3, 4)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0), sites=sites))
    wanted = model.apply({"params": jaxpeft.merge(method, params, sites=sites)}, x)
    np.testing.assert_allclose(jaxpeft.apply(model, params, x), wanted, rtol=1e-4, atol=1e-5)
    other = ByNameNnx()
    params = moved(
        method,
        jaxpeft.rewrite(
            method, jaxpeft.params_of(other), jax.random.key(0), sites=jaxpeft.find_sites(other, {})
        ),
    )
    merged = jaxpeft.with_params(
        other, jaxpeft.merge(method, params, sites=jaxpeft.find_sites(other, {}))
    )
    np.testing.assert_allclose(jaxpeft.apply(other, params, x), merged(x), rtol=1e-4, atol=1e-5)


class Sub(nn.Module):
    transposed: bool

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return (
            nn.ConvTranspose(4, (1,), name="proj")(x)
            if self.transposed
            else nn.Dense(4, name="proj")(x)
        )


class Beside(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        return Sub(False, name="a")(x) + Sub(True, name="b")(x)


@pytest.mark.parametrize("targets", [("proj",), (r"a.proj", "proj"), r".*proj"])
def test_a_module_that_no_method_knows_is_an_error_beside_one_that_is_adapted(targets: Any) -> None:
    model, x = Beside(), random(2, 3, 4)
    base = model.init(jax.random.key(0), x)["params"]
    sites = jaxpeft.find_sites(model, base, x)
    with pytest.raises(
        TargetError, match=r"matches b\.proj, which is a ConvTranspose site; lora adapts"
    ):
        jaxpeft.rewrite(jaxpeft.LoRA(targets=targets), base, jax.random.key(0), sites=sites)
    params = jaxpeft.rewrite(
        jaxpeft.LoRA(targets=targets, exclude=("b.proj",)), base, jax.random.key(0), sites=sites
    )
    assert "lora_a" in params["a"]["proj"] and "lora_a" not in params["b"]["proj"]


def test_a_module_that_no_method_knows_is_told_where_all_are_meant(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Beside(), random(2, 3, 4)
    base = model.init(jax.random.key(0), x)["params"]
    jaxpeft.rewrite(
        jaxpeft.LoRA(), base, jax.random.key(0), sites=jaxpeft.find_sites(model, base, x)
    )
    assert "not adapted, since no method supports their type: b.proj (ConvTranspose)" in caplog.text
