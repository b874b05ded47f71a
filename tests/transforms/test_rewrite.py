"""A method lifted to a whole tree: what is added, trained, merged, and left alone; scanned and
unrolled alike.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxpeft
from jaxpeft import models
from jaxpeft.core import paths
from jaxpeft.core.tree import count, stack_layers, unstack_layers
from jaxpeft.errors import ConfigError
from jaxpeft.models.base import ModelOptions
from jaxpeft.train.losses import causal_lm
from jaxpeft.train.step import init_state, make_train_step
from tests.models.conftest import tiny_config

IDS = np.random.default_rng(0).integers(4, 90, (3, 8)).astype(np.int32)
PATTERNED = jaxpeft.LoRA(
    rank=4, rank_pattern={"q_proj": 2, "layers.1.mlp.up_proj": 6}, alpha_pattern={"v_proj": 3.0}
)
PARTIAL = jaxpeft.LoRA(rank=4, targets=("q_proj", "down_proj"), layers_to_transform=(1,))
METHODS = [jaxpeft.LoRA(rank=4), PATTERNED, PARTIAL, jaxpeft.LoRA(rank=4, rslora=True)]


@functools.cache
def started(model: Any) -> Any:
    """Return the params that a model begins with."""
    return jax.jit(model.init)(jax.random.key(3), IDS)["params"]


def make(
    *, scan: bool = False, dtype: Any = jnp.float32, kind: str = "llama", **options: Any
) -> tuple[Any, Any]:
    task, labels = ("causal_lm", None) if kind == "llama" else ("sequence_classification", 3)
    unrolled = models.build(tiny_config(kind), ModelOptions(task, labels, dtype, **options))
    params = jax.tree.map(lambda x: x.astype(dtype), started(unrolled))
    if not scan:
        return unrolled, params
    scanned = models.build(
        tiny_config(kind), ModelOptions(task, labels, dtype, scan_layers=True, **options)
    )
    return scanned, stack_layers(params)


def moved(params: Any) -> Any:
    """Return the tree with every lora_b away from zero, padding apart."""

    def move(path: Any, leaf: Any) -> Any:
        return leaf + 0.05 if path[-1] == "lora_b" else leaf

    return paths.map_with_path(move, params)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.representatives("method2-scanned")
def test_a_fresh_adapter_leaves_every_output_bit_as_it_was(method: Any, scan: bool) -> None:
    model, base = make(scan=scan)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    assert count(params) > count(base)
    run = jax.jit(lambda p: jaxpeft.apply(model, p, IDS))
    np.testing.assert_array_equal(run(params), run(base))
    np.testing.assert_allclose(
        jaxpeft.apply(model, moved(params), IDS), run(moved(params)), atol=1e-5
    )
    assert np.abs(run(moved(params)) - run(base)).max() > 1e-3


@pytest.mark.parametrize(
    "method", [jaxpeft.LoRA(rank=4), jaxpeft.LoRA(rank=4, alpha_pattern={"v_proj": 3.0})]
)
def test_scanned_and_unrolled_layers_start_from_the_same_numbers(method: Any) -> None:
    (_, base), (_, stacked) = make(), make(scan=True)
    unrolled = jaxpeft.rewrite(method, base, jax.random.key(0))
    scanned = jaxpeft.rewrite(method, stacked, jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unrolled), scanned)
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(scanned), unrolled)


@pytest.mark.slow
@pytest.mark.parametrize("method", [PATTERNED, PARTIAL])
@pytest.mark.representatives("method0")
def test_padding_stays_exactly_zero_in_training_and_gives_the_unrolled_numbers(method: Any) -> None:
    batch = {
        "input_ids": IDS,
        "attention_mask": np.ones_like(IDS),
        "labels": IDS,
        "weights": np.ones(3, np.float32),
    }
    found = []
    for scan in (False, True):
        model, base = make(scan=scan)
        params = jaxpeft.rewrite(method, base, jax.random.key(0))
        trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
        optimizer = optax.adamw(1e-2)
        step = jax.jit(make_train_step(model, causal_lm, optimizer, 1))
        state = init_state(trainable, optimizer, 0)
        for _ in range(3):
            state, metrics = step(state, frozen, batch)
        found.append((state.trainable, float(metrics["loss"])))
    (unrolled, loss), (scanned, scanned_loss) = found
    assert abs(loss - scanned_loss) < 1e-5
    layers = scanned["model"]["layers"]
    if method is PATTERNED:
        up = layers["mlp"]["up_proj"]
        assert up["lora_a"].shape == (2, 32, 6)
        np.testing.assert_array_equal(up["lora_a"][0, :, 4:], 0)
        np.testing.assert_array_equal(up["lora_b"][0, 4:], 0)
        own = unrolled["model"]["layers"]["0"]["mlp"]["up_proj"]["lora_a"]
        np.testing.assert_allclose(up["lora_a"][0, :, :4], own, atol=1e-5)
    else:
        np.testing.assert_array_equal(layers["self_attn"]["q_proj"]["lora_a"][0], 0)
        assert float(jnp.abs(layers["self_attn"]["q_proj"]["lora_b"][1]).max()) > 0


def test_adapters_are_float32_on_a_bfloat16_base_which_is_not_copied() -> None:
    _, base = make(dtype=jnp.bfloat16)
    params = jaxpeft.rewrite(jaxpeft.LoRA(rank=4), base, jax.random.key(0))
    for path, leaf in paths.walk(params):
        assert leaf.dtype == (jnp.float32 if path[-1].startswith("lora") else jnp.bfloat16)
        if not path[-1].startswith("lora"):
            assert leaf is paths.get(base, path)
    assert "lora_a" not in base["model"]["layers"]["0"]["self_attn"]["q_proj"]


def trained(method: Any, kind: str = "bert") -> set[str]:
    _, base = make(kind=kind)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    return {
        ".".join(path) for path, flag in paths.walk(jaxpeft.trainable_mask(method, params)) if flag
    }


def test_what_each_method_trains() -> None:
    head = {"classifier.kernel", "classifier.bias"}
    assert trained(jaxpeft.Head()) == head
    biases = trained(jaxpeft.BitFit())
    assert {name.split(".")[-1] for name in biases - head} == {"bias"}
    assert "bert.encoder.layer.0.output.LayerNorm.bias" in biases
    everything = trained(jaxpeft.Full())
    _, base = make(kind="bert")
    assert len(everything) == len(list(paths.walk(base)))

    plain = trained(jaxpeft.LoRA(targets=("query",)))
    assert head < plain
    assert {name.split(".")[-1] for name in plain - head} == {"lora_a", "lora_b"}
    own = trained(jaxpeft.LoRA(targets=("query",), bias="lora_only")) - plain
    assert own == {f"bert.encoder.layer.{i}.attention.self.query.bias" for i in (0, 1)}
    assert trained(jaxpeft.LoRA(targets=("query",), bias="all")) - plain == biases - head
    saved = trained(jaxpeft.LoRA(targets=("query",), modules_to_save=("pooler",))) - plain
    assert saved == {"bert.pooler.dense.kernel", "bert.pooler.dense.bias"}


@pytest.mark.parametrize("method", [jaxpeft.Head(), jaxpeft.BitFit()])
def test_a_method_that_would_train_nothing_is_refused(method: Any) -> None:
    _, base = make()
    with pytest.raises(ConfigError, match=f"method '{method.name}' has no trainable parameters"):
        jaxpeft.rewrite(method, base, jax.random.key(0))


def test_rewriting_twice_is_refused() -> None:
    _, base = make()
    params = jaxpeft.rewrite(jaxpeft.LoRA(), base, jax.random.key(0))
    with pytest.raises(
        ConfigError, match=r"_proj already has lora leaves; rewrite the base, or merge first"
    ):
        jaxpeft.rewrite(jaxpeft.LoRA(), params, jax.random.key(0))


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.representatives("method2-scanned")
def test_merged_gives_what_unmerged_gives_and_merging_twice_is_refused(
    method: Any, scan: bool
) -> None:
    model, base = make(scan=scan)
    params = moved(jaxpeft.rewrite(method, base, jax.random.key(0)))
    merged = jaxpeft.merge(method, params)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    run = jax.jit(lambda p: jaxpeft.apply(model, p, IDS))
    outputs = [run(p) for p in (merged, params)]
    np.testing.assert_allclose(*outputs, atol=2e-5)
    with pytest.raises(ConfigError, match="nothing to merge: no module has lora leaves"):
        jaxpeft.merge(method, merged)


def test_a_bfloat16_base_is_merged_in_float32_and_rounded_once() -> None:
    _, base = make(dtype=jnp.bfloat16)
    method = jaxpeft.LoRA(rank=4, targets=("q_proj",))
    params = moved(jaxpeft.rewrite(method, base, jax.random.key(0)))
    site = params["model"]["layers"]["0"]["self_attn"]["q_proj"]
    merged = jaxpeft.merge(method, params)["model"]["layers"]["0"]["self_attn"]["q_proj"]["kernel"]
    delta = np.asarray(site["lora_a"], np.float64) @ (4.0 * np.asarray(site["lora_b"], np.float64))
    exact = np.asarray(site["kernel"], np.float64) + delta
    assert merged.dtype == jnp.bfloat16
    assert np.abs(np.asarray(merged, np.float64) - exact).max() <= 2**-8 * np.abs(exact).max()


def test_partition_and_combine_are_inverse_and_refuse_what_does_not_fit() -> None:
    _, base = make()
    method = jaxpeft.LoRA(rank=4)
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    mask = jaxpeft.trainable_mask(method, params)
    trainable, frozen = jaxpeft.partition(params, mask)
    jax.tree.map(np.testing.assert_array_equal, jaxpeft.combine(trainable, frozen), params)
    assert count(trainable) + count(frozen) == count(params)
    with pytest.raises(
        ValueError, match=r"mask and params have different leaves \(\d+\): .*lora_a"
    ):
        jaxpeft.partition(base, mask)
    with pytest.raises(ValueError, match="is in both trees"):
        jaxpeft.combine(params, frozen)


def test_layers_that_differ_cannot_be_stacked() -> None:
    _, base = make()
    params = jaxpeft.rewrite(PARTIAL, base, jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"layers/0 and layers/1 differ at .*keep scan_layers=False"
    ):
        stack_layers(params)


class Foreign(nn.Module):
    """Somebody else's module: a Dense under scan and remat."""

    @nn.compact
    def __call__(self, x: jax.Array, *_: Any) -> jax.Array:
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
                return jnp.tanh(nn.Dense(8, name="proj")(x)), None

        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
        )
        return stack(name="layers")(x, None)[0]


@pytest.mark.slow
def test_a_foreign_module_is_adapted_unchanged_under_jit_grad_scan_remat_and_vmap() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)), jnp.float32)
    model = Foreign()
    base = model.init(jax.random.key(0), x)["params"]
    params = moved(jaxpeft.rewrite(jaxpeft.LoRA(rank=2), base, jax.random.key(1)))

    def run(p: Any, x: jax.Array) -> jax.Array:
        return jaxpeft.apply(model, p, x)

    merged = jaxpeft.merge(jaxpeft.LoRA(rank=2), params)
    np.testing.assert_allclose(jax.jit(run)(params, x), run(merged, x), atol=1e-5)
    np.testing.assert_allclose(jax.vmap(run, (None, 0))(params, x), run(params, x), atol=1e-6)
    grads = jax.jit(jax.grad(lambda p: jnp.sum(run(p, x))))(params)
    assert float(jnp.abs(grads["layers"]["proj"]["lora_a"]).min(axis=(1, 2)).max()) > 0


@pytest.mark.slow
def test_a_sharded_base_gives_the_unsharded_numbers() -> None:
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    model, base = make()
    params = moved(jaxpeft.rewrite(jaxpeft.LoRA(rank=4), base, jax.random.key(0)))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def place(path: Any, leaf: Any) -> Any:
        split = path[-1] == "kernel" and leaf.shape[-1] % 8 == 0
        return jax.device_put(
            leaf, NamedSharding(mesh, PartitionSpec(None, "x") if split else PartitionSpec())
        )

    run = jax.jit(lambda p: jaxpeft.apply(model, p, IDS))
    np.testing.assert_allclose(run(paths.map_with_path(place, params)), run(params), atol=1e-5)


def test_a_mask_before_the_rewriting_says_what_is_missing() -> None:
    tree = {"layers": {"0": {"proj": {"kernel": jnp.ones((2, 2))}}}}
    with pytest.raises(
        ConfigError, match=r"'lora' has no trainable parameters: .*rewrite the base"
    ):
        jaxpeft.trainable_mask(jaxpeft.LoRA(rank=2), tree)
