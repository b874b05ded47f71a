"""The spec of every leaf: the rules, what is derived from them, and golden files of two models."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from benchmarks.strategies import BERT, LLAMA, mesh_of, options_of
from jaxpeft import models
from jaxpeft.core import expressions, paths, tree
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import ConfigError
from jaxpeft.kernels import QUANTIZED
from jaxpeft.methods import METHODS
from jaxpeft.models.base import ModelOptions, abstract_params
from jaxpeft.quant.quantize import Quant, stored_abstract
from jaxpeft.sharding import layout
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.sharding.sizes import STRATEGIES
from jaxpeft.transforms.rewrite import rewrite
from tests.models.conftest import tiny_config
from tests.models.test_encoder_parity import ENCODERS

GOLDEN = Path(__file__).parent / "golden"
KINDS = ("llama", "mistral", "qwen2", "qwen3", *ENCODERS)
BOTH: dict[str, Any] = {"strategy": "fsdp_tensor", "fsdp": 4, "tensor": 2}


def abstract(
    config: Any,
    method: str | None = "lora",
    quant: str | None = None,
    scan: bool = True,
    **options: Any,
) -> Tree:
    decoder = "num_key_value_heads" in config
    task = ("causal_lm", None) if decoder else ("sequence_classification", 3)
    base = abstract_params(models.build(config, ModelOptions(*task, jnp.float32, scan_layers=scan)))
    base = stored_abstract(base, Quant(quant) if quant else None)
    if method is None:
        return base
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(partial(rewrite, METHODS[method](**options)), base, key)


def found(
    params: Tree, method: str | None = "lora", options: MeshConfig | None = None, **given: Any
) -> dict[str, P]:
    mesh = options or MeshConfig(**given)
    lay = layout.layout(
        mesh_of(mesh, 8), sharding_rules(mesh), params, METHODS[method]() if method else None
    )
    return {paths.text(path): where.spec for path, where in paths.walk(lay.shardings)}


def golden(config: Any, quant: str | None) -> dict[str, dict[str, str]]:
    params = abstract(config, quant=quant)
    shapes = {paths.text(path): list(leaf.shape) for path, leaf in paths.walk(params)}
    return {
        strategy: {
            path: f"{shapes[path]} {tuple(spec)}"
            for path, spec in found(params, options=options_of(strategy, 8)).items()
        }
        for strategy in STRATEGIES
    }


@pytest.mark.parametrize(
    ("name", "config", "quant"), [("llama", LLAMA, "nf4"), ("bert", BERT, None)]
)
def test_specs_are_those_of_the_golden_files(name: str, config: Any, quant: str | None) -> None:
    assert golden(config, quant) == json.loads((GOLDEN / f"{name}.json").read_text())


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_leaf_of_every_family_is_covered(kind: str, scan: bool) -> None:
    specs_of = found(abstract(tiny_config(kind), scan=scan), **BOTH)
    kernels = {
        path: spec
        for path, spec in specs_of.items()
        if path.endswith("/kernel") and "layer" in path
    }
    assert kernels
    for path, spec in kernels.items():
        assert set(jax.tree.leaves(tuple(spec))) == {"fsdp", "tensor"}, path


SMALL = r"(.*/)?((position|token_type)_embeddings|(pre_)?classifier)/.*|.*/(scale|bias)"
CONVOLVED = tiny_config("deberta-v2", conv_kernel_size=3, share_att_key=False, embedding_size=16)


@pytest.mark.parametrize(
    "config", [*map(tiny_config, ENCODERS), CONVOLVED], ids=[*ENCODERS, "convolved"]
)
def test_fsdp_shards_every_table_and_matrix_of_an_encoder(config: Any) -> None:
    config = {**config, "vocab_size": 96}
    for path, spec in found(abstract(config, None), None, strategy="fsdp").items():
        if not re.fullmatch(SMALL, path):
            assert "fsdp" in jax.tree.leaves(tuple(spec)), path


@pytest.mark.parametrize("form", QUANTIZED)
def test_leaves_of_a_quantized_kernel_lie_as_the_kernel(form: str) -> None:
    specs_of = found(abstract(LLAMA, None, form), None, **BOTH)
    mlp = "model/layers/mlp"
    assert specs_of[f"{mlp}/gate_proj/kernel_{form}"] == P(None, ("tensor", "fsdp"))
    assert specs_of[f"{mlp}/down_proj/kernel_{form}"] == P(None, "fsdp", "tensor")
    scale = "absmax" if form == "nf4" else "scale"
    assert specs_of[f"{mlp}/gate_proj/kernel_{form}_{scale}"] == P(None, ("tensor", "fsdp"))


@pytest.mark.parametrize(
    ("method", "site", "leaf", "spec"),
    [
        ("lora", "self_attn/q_proj", "lora_a", P()),
        ("lora", "self_attn/q_proj", "lora_b", P(None, None, "tensor")),
        ("lora", "mlp/down_proj", "lora_a", P(None, "tensor")),
        ("lora", "mlp/down_proj", "lora_b", P()),
        ("lora", "mlp/down_proj", "lora_scale", P()),
        ("dora", "self_attn/q_proj", "dora_magnitude", P(None, "tensor")),
        ("adapter", "mlp/down_proj", "adapter_down", P()),
        ("ia3", "mlp/down_proj", "ia3", P(None, "tensor")),
    ],
)
def test_adapter_leaves_lie_along_the_side_of_the_kernel_that_they_run_along(
    method: str, site: str, leaf: str, spec: P
) -> None:
    specs_of = found(abstract(LLAMA, method), method, **BOTH)
    named = {
        path: own
        for path, own in specs_of.items()
        if path.startswith(f"model/layers/{site}/{leaf}")
    }
    assert named
    assert set(named.values()) == {spec}


def test_the_first_rule_wins_and_the_users_come_first() -> None:
    rules = (
        ("model/embed_tokens/embedding", "", "tensor"),
        (".*down_proj/lora_b", "", "tensor"),
        (".*lora_.*",),
    )
    specs_of = found(abstract(LLAMA), strategy="tensor", rules=rules)
    assert specs_of["model/embed_tokens/embedding"] == P(None, "tensor")
    assert specs_of["model/layers/mlp/down_proj/lora_b"] == P(None, None, "tensor")
    assert specs_of["model/layers/mlp/down_proj/lora_a"] == P()


def test_a_rule_for_a_kernel_is_one_for_what_stands_beside_it() -> None:
    rules = ((r".*/down_proj/kernel", "fsdp+tensor", ""),)
    specs_of = found(abstract(LLAMA, quant="int8"), **BOTH, rules=rules)
    assert specs_of["model/layers/mlp/down_proj/kernel_int8"] == P(None, None, ("fsdp", "tensor"))
    assert specs_of["model/layers/mlp/down_proj/lora_a"] == P(None, "tensor")


@pytest.mark.parametrize(
    ("rule", "spec"),
    [
        (("", "data"), P(None, "data")),
        (("sequence", ""), P(None, None, "sequence")),
        (("tensor",), P(None, "tensor")),
        (("data", "", "tensor"), P("data", "tensor")),
    ],
)
def test_a_rule_of_ones_own_holds_for_the_codes_whatever_it_names(
    rule: tuple[str, ...], spec: P
) -> None:
    plain, stored = (
        found(
            abstract({**LLAMA, "num_hidden_layers": 2}, None, quant=quant),
            None,
            strategy="sequence",
            data=2,
            sequence=2,
            tensor=2,
            rules=((r".*/q_proj/kernel", *rule),),
        )
        for quant in (None, "int8")
    )
    at = "model/layers/self_attn/q_proj/kernel"
    # the codes are stored [out, in]
    where = tuple(plain[at]) + (None,) * (3 - len(plain[at]))
    wanted = P(where[0], where[2], where[1])
    assert tuple(stored[f"{at}_int8"]) == tuple(spec)
    assert tuple(wanted)[: len(spec)] == tuple(spec)


def test_codes_that_a_rule_of_ones_own_does_not_divide_are_refused() -> None:
    params = abstract({**LLAMA, "intermediate_size": 132}, None, quant="int8")
    said = (
        "mesh.rules: '.*/down_proj/kernel': model/layers/mlp/down_proj/kernel_int8 [2, 64, 132]:"
        " tensor 8 does not divide 132"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        found(params, None, strategy="tensor", rules=((r".*/down_proj/kernel", "tensor", ""),))


def test_a_rule_that_matches_no_leaf_is_refused() -> None:
    options = MeshConfig(
        strategy="fsdp",
        rules=((r".*/q_proj/kernel",), (r"model/embed_tokens/embeding",), (r".*/lora_a",)),
    )
    said = (
        "mesh.rules: 'model/embed_tokens/embeding' matches no leaf; did you mean"
        " 'model/embed_tokens/embedding'?"
    )
    for quant in (None, "nf4"):
        with pytest.raises(ConfigError, match=f"^{re.escape(said)}$"):
            layout.require_used(sharding_rules(options), abstract(LLAMA, quant=quant))
    stored = MeshConfig(
        strategy="fsdp", rules=((r".*/kernel_nf4",), (r".*/lora_a",), (r".*/adapter_down",))
    )
    trees = abstract(LLAMA, quant="nf4"), abstract(LLAMA, "adapter")
    layout.require_used(sharding_rules(stored), *trees)
    with pytest.raises(ConfigError, match="adapter_down' matches no leaf"):
        layout.require_used(sharding_rules(stored), trees[0])


def test_a_leaf_that_no_rule_covers_is_an_error() -> None:
    params = abstract(LLAMA, None) | {
        "extra": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}
    }
    said = (
        "extra/kernel: no sharding rule matches; add one to mesh.rules, such as"
        " ('extra/kernel',) to replicate it"
    )
    with pytest.raises(ConfigError, match=re.escape(said)):
        found(params, None, strategy="fsdp")
    assert found(params, None, data=2)["extra/kernel"] == P()


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (
            ("lm_head/kernel", "", "", "tensor"),
            "mesh.rules: 'lm_head/kernel' has axes for 3 dimensions, but lm_head/kernel has shape [64, 100]",
        ),
        (
            ("lm_head/kernel", "", "fsdp+tensor"),
            (
                "mesh.rules: 'lm_head/kernel': lm_head/kernel [64, 100]: fsdp 4 x tensor 2 does not"
                " divide 100"
            ),
        ),
        (
            ("(.|..|...)*[^a-z0-9/_.]",),
            "mesh.rules: the regular expression '(.|..|...)*[^a-z0-9/_.]' takes more than 0.2 s",
        ),
    ],
)
def test_rules_of_the_users_that_do_not_go_with_a_leaf_are_errors(
    rule: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expressions, "SECONDS", 0.2)  # the last would go on for ever
    params = abstract({**LLAMA, "vocab_size": 100})
    with pytest.raises(ConfigError, match=re.escape(said)):
        found(params, **BOTH, rules=(rule,))


def test_an_axis_that_does_not_divide_is_left_out_and_reported(
    caplog: pytest.LogCaptureFixture,
) -> None:
    params = abstract({**LLAMA, "vocab_size": 99, "intermediate_size": 132}, None, scan=False)
    options = MeshConfig(strategy="tensor")
    lay = layout.layout(mesh_of(options, 8), sharding_rules(options), params)
    assert "lm_head/kernel [64, 99]: tensor 8 does not divide 99" in lay.dropped
    layout.log_dropped(lay, most=10)
    said = caplog.messages[-1]
    assert "model/layers/*/mlp/gate_proj/kernel [64, 132]: tensor 8 does not divide 132" in said
    assert said.count("gate_proj") == 1


def test_fsdp_takes_another_dimension_where_its_own_does_not_divide() -> None:
    specs_of = found(abstract({**LLAMA, "vocab_size": 99}), strategy="fsdp")
    assert specs_of["lm_head/kernel"] == P("fsdp")


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_moments_lie_as_the_leaf_they_are_of(name: str) -> None:
    optimizer = {
        "adamw": optax.adamw(1e-3),
        "adafactor": optax.chain(optax.clip_by_global_norm(1.0), optax.adafactor(1e-3)),
        "sgd": optax.sgd(1e-3, 0.9),
    }[name]
    method, options = METHODS["lora"](), MeshConfig(strategy="tensor")
    params, mesh = abstract(LLAMA), mesh_of(options, 8)
    where, mask = (
        layout.shardings(mesh, sharding_rules(options), params, method),
        trainable_mask(method, params),
    )
    trainable, of = tree.partition(params, mask)[0], tree.partition(where, mask)[0]
    state = jax.eval_shape(optimizer.init, trainable)
    places = layout.state_shardings(mesh, state, trainable, of)
    spread = 0
    for (keys, leaf), place in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True
    ):
        text = jax.tree_util.keystr(keys)
        if "gate_proj" in text and "lora_b" in text and leaf.shape == (2, 8, 128):
            assert place.spec == P(None, None, "tensor")
            spread += 1
        if leaf.ndim == 0:
            assert place.is_fully_replicated
    assert spread == {"adamw": 2, "adafactor": 1, "sgd": 1}[name]


def test_offloaded_are_the_frozen_matrices_of_layers() -> None:
    options = MeshConfig(strategy="fsdp", offload=True)
    for method, offloaded in (("lora", True), ("full", False)):
        lay = layout.layout(
            mesh_of(options, 8), sharding_rules(options), abstract(LLAMA, method), METHODS[method]()
        )
        kinds = {paths.text(path): where.memory_kind for path, where in paths.walk(lay.shardings)}
        assert (kinds["model/layers/mlp/gate_proj/kernel"] == layout.HOST) == offloaded
        assert layout.HOST not in {
            kind for path, kind in kinds.items() if not path.endswith("_proj/kernel")
        }


def test_codes_are_gathered_by_the_path_within_a_layer_unless_layers_differ() -> None:
    mesh = mesh_of(MeshConfig(strategy="fsdp"), 8)

    def found(*names: str) -> dict[str, Any]:
        specs = {"a": P(None, "fsdp"), "b": P(None, ("tensor", "fsdp")), "c": P()}
        leaves = {}
        for layers, spec in (name.split("=") for name in names):
            where = specs[spec] if layers.isdigit() else P(None, *specs[spec])
            leaves[layers] = {"q_proj": {"kernel_nf4": jax.NamedSharding(mesh, where)}}
        tree = layout.Layout({"model": {"layers": leaves}}, ())
        return {paths.text(path): spec for path, spec in layout.gathered_codes(tree)}

    assert found("0=a", "1:9:2=a", "2:9:2=a") == {"q_proj/kernel_nf4": P()}
    assert found("0=c", "1:9:2=c") == {}
    assert found("0=a", "1:9:2=b", "2:9:2=c") == {
        "0/q_proj/kernel_nf4": P(),
        "1:9:2/q_proj/kernel_nf4": P(None, "tensor"),
    }
