"""DoRA's own: the constant norm, dropout, padding, and the real `peft` in all its options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxpeft
from jaxpeft.core.tree import combine
from jaxpeft.errors import ConfigError
from jaxpeft.hub.adapters import peft_config
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, leaves, load, run
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

RNG = np.random.default_rng(0)


class Holder(nn.Module):
    """One linear module."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(6, name="proj")(x)


def random(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def site(**options: Any) -> tuple[Any, Any]:
    """Return one linear site with a moved adapter: `(model, params)`."""
    base = {"proj": {"kernel": random(8, 6), "bias": random(6)}}
    params = jaxpeft.rewrite(jaxpeft.DoRA(rank=2, alpha=6.0, **options), base, jax.random.key(1))
    params["proj"] |= {"dora_b": random(2, 6), "dora_magnitude": 1 + jnp.abs(random(6))}
    return Holder(), params


def test_value_and_gradients_are_those_of_peft() -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    model, params = site()
    own, x = params["proj"], random(5, 8)
    holder = torch.nn.Sequential()
    holder.add_module("proj", torch.nn.Linear(8, 6))
    layer = get_peft_model(
        holder, LoraConfig(r=2, lora_alpha=6, use_dora=True, target_modules=["proj"])
    ).base_model.model.proj
    given = {
        layer.base_layer.weight: own["kernel"].T,
        layer.base_layer.bias: own["bias"],
        layer.lora_A["default"].weight: own["dora_a"].T,
        layer.lora_B["default"].weight: own["dora_b"].T,
        layer.lora_magnitude_vector["default"].weight: own["dora_magnitude"],
    }
    with torch.no_grad():
        for tensor, leaf in given.items():
            tensor.copy_(torch.tensor(np.array(leaf)))
    wanted = torch.sin(layer(torch.tensor(np.array(x)))).sum()
    wanted.backward()

    def total(adapter: Any) -> Any:
        return jnp.sum(jnp.sin(jaxpeft.apply(model, {"proj": own | adapter}, x)))

    found, grads = jax.value_and_grad(total)(
        {name: own[name] for name in ("dora_a", "dora_b", "dora_magnitude")}
    )
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5)
    theirs = [tensor.grad.numpy() for tensor in list(given)[2:]]
    np.testing.assert_allclose(grads["dora_a"].T, theirs[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["dora_b"].T, theirs[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(grads["dora_magnitude"], theirs[2], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_dropout_is_on_all_but_the_bases_own_product() -> None:
    model, params = site(dropout=0.5)
    own, x = params["proj"], random(4, 8)
    calls = jax.vmap(lambda key: jaxpeft.apply(model, params, x, rngs={"dropout": key}))(
        jax.random.split(jax.random.key(2), 40)
    )
    whole = own["kernel"] + 3.0 * own["dora_a"] @ own["dora_b"]
    g = own["dora_magnitude"] / jnp.linalg.norm(whole, axis=0)
    # y is linear in D(x): what differs from the base's own product is D(x) times one matrix
    rest = np.asarray(calls) - np.asarray(x @ own["kernel"] + own["bias"])
    matrix = (g - 1) * own["kernel"] + g * 3.0 * (own["dora_a"] @ own["dora_b"])
    masks = np.array(np.meshgrid(*[[0.0, 2.0]] * 8)).reshape(8, -1).T
    possible = np.asarray(masks[:, None] * x @ matrix)
    nearest = np.abs(rest[:, None] - possible[None]).max(-1).min(1)
    assert nearest.max() < 1e-4


@pytest.mark.slow
def test_a_column_of_zeros_and_padding_give_no_nan() -> None:
    base = {"proj": {"kernel": random(8, 6).at[:, 2].set(0.0)}}
    params = jaxpeft.rewrite(jaxpeft.DoRA(rank=2), base, jax.random.key(0))
    x = random(3, 8)
    np.testing.assert_allclose(
        jaxpeft.apply(nn_of(base), params, x), x @ base["proj"]["kernel"], atol=1e-6
    )

    method = jaxpeft.DoRA(rank=2, targets=("q_proj", "down_proj"), layers_to_transform=(1,))
    model, plain = load("llama", scan_layers=True)
    fresh = jaxpeft.rewrite(method, plain, jax.random.key(0))
    np.testing.assert_array_equal(run(model, fresh), run(model, plain))
    changed = moved(method, fresh)
    trainable, frozen = jaxpeft.partition(changed, jaxpeft.trainable_mask(method, changed))
    grads = jax.jit(
        jax.grad(lambda t: jnp.sum(jnp.square(jaxpeft.apply(model, combine(t, frozen), BATCH.ids))))
    )(trainable)
    for name, leaf in leaves(grads).items():
        assert np.isfinite(leaf).all(), name
        assert not leaf[0].any(), name
        assert leaf[1].any(), name
    other, _ = load("llama")
    np.testing.assert_allclose(run(model, changed), run(other, without_padding(changed)), atol=1e-4)
    np.testing.assert_allclose(
        run(model, jaxpeft.merge(method, changed)), run(model, changed), atol=1e-4
    )


def nn_of(base: Any) -> Any:
    del base

    class Plain(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return nn.Dense(6, use_bias=False, name="proj")(x)

    return Plain()


def without_padding(tree: Any) -> Any:
    """Unroll a tree and drops the adapter leaves of the first layer, which is not adapted."""
    tree = jaxpeft.unstack_layers(tree)
    for module in (
        tree["model"]["layers"]["0"]["self_attn"]["q_proj"],
        tree["model"]["layers"]["0"]["mlp"]["down_proj"],
    ):
        for key in [key for key in module if key.startswith("dora_")]:
            del module[key]
    return tree


VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "embedding": (
        "llama",
        {"targets": r".*(embed_tokens|v_proj)"},
        {"target_modules": r".*(embed_tokens|v_proj)"},
    ),
    "biases": (
        "bert",
        {"targets": ("query",), "bias": "lora_only"},
        {"target_modules": ["query"], "bias": "lora_only"},
    ),
    "all biases": (
        "bert",
        {"targets": ("query",), "bias": "all"},
        {"target_modules": ["query"], "bias": "all"},
    ),
    "patterns": (
        "llama",
        {
            "targets": r".*\.(q_proj|v_proj)",
            "rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 3.0},
        },
        {
            "target_modules": r".*\.(q_proj|v_proj)",
            "use_rslora": True,
            "rank_pattern": {"v_proj": 2},
            "alpha_pattern": {"q_proj": 3.0},
        },
    ),
    "dropout": (
        "llama",
        {"targets": ("q_proj",), "dropout": 0.1},
        {"target_modules": ["q_proj"], "lora_dropout": 0.1},
    ),
}


@pytest.mark.slow
@quiet
@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning")
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.representatives("patterns")
def test_variants_go_both_ways(reference: Any, tmp_path: Path, name: str) -> None:
    kind, options, peft = VARIANTS[name]
    method = jaxpeft.DoRA(rank=4, alpha=6.0, **options)
    case = case_of(method, kind, "LoraConfig", r=4, lora_alpha=6, use_dora=True, **peft)
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


@quiet
@pytest.mark.parametrize("start", ["pissa", "olora", "gaussian", "orthogonal"])
@pytest.mark.representatives("olora")
@pytest.mark.slow
def test_other_starts_are_the_base_and_are_saved_as_what_peft_loads(
    reference: Any, tmp_path: Path, start: Any
) -> None:
    method = jaxpeft.DoRA(rank=4, alpha=6.0, targets=("q_proj", "down_proj"), init_weights=start)
    model, base = load("llama")
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    np.testing.assert_allclose(run(model, fresh), run(model, base), atol=2e-5)
    case = case_of(method, "llama", "LoraConfig")
    assert exported(reference, tmp_path, case) < 1e-5


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dora\.lora_bias: is not supported by DoRA; remove it"):
        jaxpeft.DoRA(lora_bias=True)
    dora = {"peft_type": "LORA", "use_dora": True}
    assert peft_config.method_of(dora) is jaxpeft.DoRA
    assert peft_config.method_of(dora | {"use_dora": False}) is jaxpeft.LoRA
    _, problems = jaxpeft.DoRA.peft.read_options(
        jaxpeft.DoRA,
        {"use_dora": True, "r": 4, "lora_alpha": 8, "target_modules": ["q"], "use_qalora": True},
    )
    assert problems == ["use_qalora: True is not supported by the dora method; nothing was loaded"]
