"""What `apply`, `rewrite` and `merge` are given: another model's parameters, another method's tree,
numbers that are none.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.methods import METHODS
from tests.core.helpers import load

KEY = jax.random.key(0)
IDS = np.asarray([[1, 2, 3], [4, 5, 0]])
NAN = float("nan")
LORA = jaxpeft.LoRA(rank=4, targets=["q_proj", "v_proj"])


def changed(tree: Any, path: str, to: Any) -> Any:
    """Return a tree with the leaf at a path made another."""
    return paths.map_with_path(lambda at, leaf: to(leaf) if paths.text(at) == path else leaf, tree)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        (
            "attention_mask",
            [[1, 1, 1], [1, 0.5, 0]],
            "1 for a token and 0 for padding, is 0.5 in row 1, position 1",
        ),
        ("attention_mask", [[1, 1, -1], [1, 1, 0]], "is -1 in row 0, position 2"),
        ("attention_mask", [[1, 1, NAN], [1, 1, 0]], "is nan in row 0, position 2"),
        ("attention_mask", [[1, 2, 3], [1, 2, 0]], "is 2 in row 0, position 1"),
        ("attention_mask", [[0.0, -np.inf, 0.0]] * 2, "is -inf in row 0, position 1"),
        (
            "attention_mask",
            [["1", "1", "1"]] * 2,
            "attention_mask: must be numeric, 1 for a token and 0 for padding, is <U1",
        ),
        ("attention_mask", [[1j, 0, 0]] * 2, "attention_mask: must be numeric"),
        ("attention_mask", [[1, 1], [1]], "attention_mask: rows differ in length"),
        ("input_ids", [[1, -1]], "input_ids: -1 is outside the vocabulary of 99"),
        ("input_ids", [[1, 99]], "input_ids: 99 is outside the vocabulary of 99"),
        ("input_ids", [[1, 2**40]], "input_ids: 1099511627776 is outside the vocabulary of 99"),
        ("input_ids", [[1.0, 2.0]], r"input_ids: must be integers .* are float64 \[1, 2\]"),
        ("input_ids", [[True, False]], r"input_ids: must be integers .* are bool"),
        ("input_ids", [1, 2], r"input_ids: must be integers \[batch, length\]"),
        ("input_ids", [["a", "b"]], "input_ids: must be integers"),
        ("input_ids", [[10**30, 1]], "input_ids: must be integers .* are object"),
        ("token_type_ids", [[0, 0.5, 0]], "token_type_ids: must be integers, are float64"),
        ("position_ids", [[0, -1, 2]], "position_ids: -1 is outside the model's table of 40"),
        ("segment_ids", [[0.0, NAN, 1.0]], "segment_ids: must be integers"),
        ("segment_ids", [[0, -1, 1]], "segment_ids: -1 is outside"),
        (
            "position_id",
            [[0, 1, 2]],
            "apply: 'position_id' is not an input of the model; did you mean 'position_ids'",
        ),
    ],
)
def test_inputs_that_cannot_be_right_are_refused_by_name_and_place(
    name: str, value: Any, says: str
) -> None:
    model, params = load("bert")
    with pytest.raises(DataError, match=says):
        jaxpeft.apply(model, params, **{"input_ids": IDS, name: value})


def test_numbers_on_a_device_are_looked_at_likewise() -> None:
    model, params = load("bert")
    with pytest.raises(DataError, match="is nan in row 1, position 0"):
        jaxpeft.apply(model, params, jnp.asarray(IDS), jnp.asarray([[1, 1, 1], [NAN, 1, 0]]))
    with pytest.raises(DataError, match="input_ids: 99 is outside"):
        jaxpeft.apply(model, params, jnp.asarray(IDS).at[0, 0].set(99))


@pytest.mark.parametrize("mask", [np.float32, bool, np.int8, np.int64])
@pytest.mark.representatives("bool", "int8", "int64")
def test_a_mask_of_zeros_and_ones_is_one_in_any_dtype(mask: Any) -> None:
    model, params = load("bert")
    plain = jaxpeft.apply(model, params, IDS, np.asarray([[1, 1, 1], [1, 1, 0]]))
    made = jaxpeft.apply(model, params, IDS, np.asarray([[1, 1, 1], [1, 1, 0]], mask))
    np.testing.assert_array_equal(made, plain)


def test_of_traced_inputs_the_shapes_and_dtypes_are_checked_alone() -> None:
    model, params = load("bert")
    run = jax.jit(lambda params, ids, mask: jaxpeft.apply(model, params, ids, mask))
    assert run(params, IDS, np.full(IDS.shape, 0.5)).shape == (2, 3)
    with pytest.raises(DataError, match="input_ids: must be integers"):
        run(params, IDS.astype(np.float32), IDS)
    with pytest.raises(DataError, match="attention_mask: has shape"):
        run(params, IDS, IDS[:, :2])


def test_the_number_of_an_adapter_is_one_of_the_bank() -> None:
    model, base = load("llama")
    method = jaxpeft.LoRA(rank=2, targets=["q_proj"])
    tree = jaxpeft.bank(
        [(method, jaxpeft.rewrite(method, base, jax.random.key(i))) for i in range(2)]
    )
    assert jaxpeft.apply(model, tree, IDS, adapter=[0, 1]).shape[0] == 2
    for wrong, says in (
        (2, "adapter: 2 is outside the stack of 2"),
        (-1, "-1 is outside"),
        (0.5, "must be the index"),
        ([0, 3], "3 is"),
    ):
        with pytest.raises(DataError, match=says):
            jaxpeft.apply(model, tree, IDS, adapter=wrong)


def test_another_models_parameters_are_told_by_their_first_leaf() -> None:
    model, params = load("llama")
    _, other = load("bert")
    with pytest.raises(
        ConfigError,
        match=(
            r"^lm_head/kernel: is missing, must have shape .*; these are another model's"
            r" parameters"
        ),
    ):
        jaxpeft.apply(model, other, IDS)
    wide = changed(
        params, "model/layers/1/mlp/up_proj/kernel", lambda leaf: jnp.pad(leaf, ((0, 0), (0, 3)))
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"^model/layers/1/mlp/up_proj/kernel: has shape .*, must have .*;"
            r" these are"
        ),
    ):
        jaxpeft.apply(model, wide, IDS)
    rewritten = jaxpeft.rewrite(jaxpeft.LoRA(rank=2), wide, KEY)
    with pytest.raises(ConfigError, match=r"^model/layers/1/mlp/up_proj/kernel: has shape"):
        jax.jit(lambda tree: jaxpeft.apply(model, tree, IDS))(rewritten)
    with pytest.raises(
        ConfigError, match=r"^lm_head/kernel: is missing, .*; give the value of 'params'"
    ):
        jaxpeft.apply(model, {"params": params}, IDS)


@pytest.mark.parametrize("scanned", [False, True])
@pytest.mark.parametrize(
    ("extra", "added"),
    [
        ("self_attn/q_proj/bias", False),
        ("input_layernorm/bias", False),
        ("self_attn/q_norm/scale", False),
        ("mlp/router/kernel", False),
        ("mlp/router/kernel_nf4", False),
        ("mlp/router/lora_a", False),
        ("mlp/lora", False),
        ("mlp/up_proj/prompt", False),
        ("self_attn/q_proj/ia3_l", True),
    ],
)
def test_what_a_model_would_compute_without_is_refused(
    extra: str, added: bool, scanned: bool
) -> None:
    model, params = load("llama", scan_layers=scanned)
    where = "model/layers/" + ("" if scanned else "1/") + extra
    sizes = (2, 32) if scanned else (32,)
    for tree in (params, jaxpeft.rewrite(jaxpeft.LoRA(rank=2, targets=["v_proj"]), params, KEY)):
        more = paths.build([*paths.walk(tree), (tuple(where.split("/")), jnp.ones(sizes))])
        if added:
            assert jax.eval_shape(lambda more=more: jaxpeft.apply(model, more, IDS)).shape == (
                *IDS.shape,
                99,
            )
            continue
        with pytest.raises(
            ConfigError, match=f"^{where}: is not a leaf of the model; these are another"
        ):
            jaxpeft.apply(model, more, IDS)


@pytest.mark.parametrize("kind", ["nf4", "int8", "fp8"])
@pytest.mark.representatives("int8")
def test_a_quantized_base_with_adapters_at_sites_and_at_the_root_is_the_models_own(
    kind: str,
) -> None:
    model, params = load("llama")
    method = jaxpeft.Mixed(methods=(jaxpeft.LoRA(rank=2), jaxpeft.PromptTuning()))
    tree = jaxpeft.rewrite(method, jaxpeft.quantize(params, kind), KEY)
    assert jax.eval_shape(lambda: jaxpeft.apply(model, tree, IDS)).shape == (*IDS.shape, 99)


def test_a_deeper_models_layers_are_not_left_out_in_silence() -> None:
    model, params = load("llama")
    last = str(len(params["model"]["layers"]))
    deeper = {
        **params,
        "model": {
            **params["model"],
            "layers": {**params["model"]["layers"], last: params["model"]["layers"]["0"]},
        },
    }
    with pytest.raises(ConfigError, match=rf"model/layers/{last}/.*: the model has {last} layers"):
        jaxpeft.apply(model, deeper, IDS)
    del deeper["model"]["layers"]["0"], deeper["model"]["layers"][last]
    with pytest.raises(ConfigError, match=r"model/layers/0/.*: is missing"):
        jaxpeft.apply(model, deeper, IDS)


def test_a_module_of_somebody_else_is_told_likewise_and_its_own_errors_are_as_they_were() -> None:
    class Two(nn.Module):
        @nn.compact
        def __call__(self, x: Any, broken: bool = False) -> Any:
            if broken:
                raise ValueError("of the module's own")
            return nn.Dense(2, name="second")(nn.Dense(4, name="first")(x))

    x = jnp.ones((1, 3))
    params = Two().init(KEY, x)["params"]
    with pytest.raises(
        ConfigError, match=r"^second/kernel: has shape \[5, 2\], must have \[4, 2\]"
    ):
        jaxpeft.apply(Two(), changed(params, "second/kernel", lambda leaf: jnp.ones((5, 2))), x)
    with pytest.raises(ValueError, match=r"^of the module's own"):
        jaxpeft.apply(Two(), params, x, broken=True)


@pytest.mark.parametrize(
    ("leaf", "says"),
    [
        (
            lambda leaf: leaf.astype(jnp.int8),
            r"down_proj/kernel: must be an array of floats, is int8 \[48, 32\]",
        ),
        (lambda leaf: leaf.astype(bool), "down_proj/kernel: must be an array of floats, is bool"),
        (
            lambda leaf: leaf.astype(jnp.complex64),
            "down_proj/kernel: must be an array of floats, is complex64",
        ),
        (lambda leaf: None, r"down_proj/kernel: must be an array, is None \(NoneType\)"),
        (
            lambda leaf: [[1.0, 2.0]],
            r"down_proj/kernel: must be an array, is \[\[1.0, 2.0\]\] \(list\)",
        ),
    ],
)
@pytest.mark.parametrize("use", ["apply", "rewrite", "merge"])
def test_a_leaf_that_is_no_array_of_floats_is_refused_with_its_path(
    leaf: Any, says: str, use: str
) -> None:
    model, params = load("llama")
    method = jaxpeft.LoRA(rank=2)
    tree = jaxpeft.rewrite(method, params, KEY) if use == "merge" else params
    wrong = changed(tree, "model/layers/0/mlp/down_proj/kernel", leaf)
    run = {
        "apply": lambda: jaxpeft.apply(model, wrong, IDS),
        "rewrite": lambda: jaxpeft.rewrite(method, wrong, KEY),
        "merge": lambda: jaxpeft.merge(method, wrong),
    }
    with pytest.raises(ConfigError, match=f"^model/layers/0/mlp/{says}"):
        run[use]()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        (None, "^params: must be the nested dict of a model's parameters, is None"),
        ([1], r"^params: must be the nested dict of a model's parameters, is \[1\]"),
        (jnp.ones(2), "^params: must be the nested dict"),
        (
            {1: {"kernel": jnp.ones((2, 2))}},
            "^params: the keys of its dicts must be strings, not 1; use '1'",
        ),
        (
            {"a": {("b",): jnp.ones((2, 2))}},
            r"^params: the keys of its dicts must be strings, not \('b',\)",
        ),
        ({"a": {"kernel": torch.ones(2, 2)}}, r"^a/kernel: must be an array, is tensor\("),
        ({"a": {"other": torch.ones(2, 2).int()}}, r"^a/other: must be an array, is tensor\("),
    ],
)
@pytest.mark.parametrize("use", ["apply", "rewrite", "merge"])
def test_what_is_no_tree_of_arrays_is_refused(params: Any, says: str, use: str) -> None:
    run = {
        "apply": lambda: jaxpeft.apply(load("llama")[0], params, IDS),
        "merge": lambda: jaxpeft.merge(LORA, params),
        "rewrite": lambda: jaxpeft.rewrite(LORA, params, KEY),
    }
    with pytest.raises(ConfigError, match=says):
        run[use]()


@pytest.mark.parametrize(
    "rng", [0, None, "key", jax.random.split(KEY, 2), jnp.ones(2), np.ones((2, 2), np.uint32)]
)
def test_the_key_of_a_rewrite_is_one_key(rng: Any) -> None:
    _, params = load("llama")
    with pytest.raises(
        ConfigError, match=r"^rng: must be one key, such as jax.random.key\(0\), is"
    ):
        jaxpeft.rewrite(LORA, params, rng)
    assert jax.eval_shape(lambda: jaxpeft.rewrite(LORA, params, jax.random.PRNGKey(0)))


@pytest.mark.parametrize("second", ["lora", "dora", "bitfit", "prompt"])
@pytest.mark.parametrize("first", ["lora", "prefix"])
def test_a_tree_is_rewritten_once_by_whatever_method(first: str, second: str) -> None:
    _, params = load("llama")
    rewritten = jaxpeft.rewrite(METHODS[first](), params, KEY)
    with pytest.raises(
        ConfigError, match=f"already has {first} leaves; rewrite the base, or merge first"
    ):
        jaxpeft.rewrite(METHODS[second](), rewritten, KEY)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (
            jaxpeft.LoRA(rank=2, targets=LORA.targets),
            r"^model/layers/0/self_attn/q_proj/lora_a: has shape \[32, 4\], but lora .* \[32, 2\]",
        ),
        (
            jaxpeft.LoRA(rank=8, targets=LORA.targets),
            r"^model/layers/0/self_attn/q_proj/lora_a: has shape \[32, 4\]",
        ),
        (
            jaxpeft.LoRA(rank=4, targets=["q_proj"]),
            r"v_proj/lora_a: lora with these options does not have this leaf",
        ),
        (
            jaxpeft.LoRA(rank=4),
            r"/lora_a: is missing, but lora with these options has it",
        ),
        (
            jaxpeft.LoRA(rank=4, targets=LORA.targets, dropout=0.1),
            r"lora_dropout: is missing, but lora with these options has it",
        ),
        (jaxpeft.LoRA(rank=4, targets=["query"]), "targets: 'query' matches no site"),
        (jaxpeft.DoRA(rank=4, targets=LORA.targets), "no module has dora leaves"),
        (jaxpeft.IA3(), "no module has ia3 leaves"),
    ],
)
@pytest.mark.parametrize("scanned", [False, True])
def test_merging_is_with_the_method_that_made_the_tree(
    method: Any, says: str, scanned: bool
) -> None:
    _, params = load("llama", scan_layers=scanned)
    tree = jaxpeft.rewrite(LORA, params, KEY)
    assert jaxpeft.merge(LORA, tree)
    if scanned:
        says = says.replace("layers/0", "layers").replace(r"\[32, ", r"\[\d, 32, ")
    with pytest.raises((ConfigError, jaxpeft.JaxpeftError), match=says):
        jaxpeft.merge(method, tree)


def test_a_tree_of_two_adapters_is_not_merged_by_one_of_them() -> None:
    _, params = load("llama")
    both = jaxpeft.Mixed(methods=(LORA, jaxpeft.IA3(targets=["k_proj"], feedforward=[])))
    tree = jaxpeft.rewrite(both, params, KEY)
    with pytest.raises(
        ConfigError, match=r"k_proj/ia3_l: lora with these options does not have this leaf"
    ):
        jaxpeft.merge(LORA, tree)
    assert jaxpeft.merge(both, tree)


def test_an_adapter_picked_from_a_bank_is_merged_with_its_own_rank() -> None:
    _, params = load("llama")
    large = jaxpeft.LoRA(rank=8, targets=LORA.targets)
    trees = [
        (LORA, jaxpeft.rewrite(LORA, params, KEY)),
        (large, jaxpeft.rewrite(large, params, KEY)),
    ]
    picked = jaxpeft.pick(LORA, jaxpeft.bank(trees), 0)
    jax.tree.map(
        np.testing.assert_array_equal, jaxpeft.merge(LORA, picked), jaxpeft.merge(*trees[0])
    )
