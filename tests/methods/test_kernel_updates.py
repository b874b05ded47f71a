"""GLoRA, PEANuT, DEFT, OSF and Super-Tuning, whose updates follow from the kernel: their variants
against the real `peft`, what they start from, and what is refused.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core.method import Call
from jaxpeft.errors import AdapterError, ConfigError
from tests.core.helpers import BATCH, load, run
from tests.hub.helpers import edit_json
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = quiet
KEY = jax.random.key(0)
WIDE = r".*\.(k_proj|up_proj|down_proj)"  # 32 to 16, 32 to 48, and 48 to 32
BERT = r".*\.(query|intermediate\.dense|output\.dense)"

VARIANTS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "glora vector": (
        jaxpeft.GLoRA(
            rank=3, kernel_form="vector", coupling_form="vector", bias="glora_only", targets=BERT
        ),
        "bert",
        "GloraConfig",
        {"r": 3, "config_A_B": "vector", "config_C": "vector", "bias": "glora_only"},
    ),
    "glora constant": (
        jaxpeft.GLoRA(
            kernel_form="constant", coupling_form="none", bias_form="vector", targets=BERT
        ),
        "bert",
        "GloraConfig",
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "vector"},
    ),
    "glora bias": (
        jaxpeft.GLoRA(kernel_form="none", bias_form="none", targets=BERT),
        "bert",
        "GloraConfig",
        {"config_A_B": "none", "config_D_E": "none"},
    ),
    "peanut deep": (
        jaxpeft.PEANuT(
            rank=4,
            depth=2,
            activation="sigmoid",
            scaling=0.5,
            targets=("down_proj",),
            layers_to_transform=(1,),
        ),
        "llama",
        "PeanutConfig",
        {
            "r": 4,
            "depth": 2,
            "act_fn": "sigmoid",
            "scaling": 0.5,
            "target_modules": ["down_proj"],
            "layers_to_transform": [1],
        },
    ),
    "deft qr": (
        jaxpeft.DEFT(rank=20, projection="qr", bias="deft_only", dropout=0.1, targets=BERT),
        "bert",
        "DeftConfig",
        {"r": 20, "decomposition_method": "qr", "bias": "deft_only", "deft_dropout": 0.1},
    ),
    "deft para": (
        jaxpeft.DEFT(rank=4, inject=False, targets=WIDE),
        "llama",
        "DeftConfig",
        {"r": 4, "para": True},
    ),
    "osf number": (
        jaxpeft.OSF(kept_rank=5, targets=WIDE),
        "llama",
        "OSFConfig",
        {"effective_rank": 5},
    ),
    "supertuning smallest": (
        jaxpeft.SuperTuning(share=0.25, select="smallest", targets=BERT),
        "bert",
        "SupertuningConfig",
        {"sparsity": 0.75, "select_top": False},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_go_both_ways(reference: Any, tmp_path: Path, name: str) -> None:
    method, kind, config, options = VARIANTS[name]
    sites = {"target_modules": BERT if kind == "bert" else WIDE}
    case = case_of(method, kind, config, size=0.1, **sites | options)
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


# ------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize("projection", ["relu", "qr"])
@pytest.mark.parametrize("alpha", [None, 12])
@pytest.mark.representatives("12-qr")
def test_a_fresh_deft_is_the_base_up_to_rounding(projection: str, alpha: int | None) -> None:
    model, base = load("llama")
    method = jaxpeft.DEFT(rank=4, alpha=alpha, projection=projection, targets=WIDE)
    fresh = jaxpeft.rewrite(method, base, KEY)
    assert np.abs(fresh["model"]["layers"]["0"]["mlp"]["up_proj"]["deft_r"]).max() > 1e-3
    np.testing.assert_allclose(run(model, fresh), run(model, base), atol=1e-5)


@pytest.mark.slow
def test_dropout_of_deft_acts_in_training_only() -> None:
    model, base = load("llama")
    method = jaxpeft.DEFT(rank=4, dropout=0.3, targets=("up_proj",), layers_to_transform=(1,))
    params = jaxpeft.rewrite(method, base, KEY)
    site = params["model"]["layers"]["1"]["mlp"]["up_proj"]
    dropless = {name: leaf for name, leaf in site.items() if name != "deft_dropout"}
    one = jaxpeft.apply(model, params, BATCH.ids, rngs={"dropout": KEY})
    assert np.abs(one - run(model, params)).max() > 1e-4
    params["model"]["layers"]["1"]["mlp"]["up_proj"] = dropless
    np.testing.assert_array_equal(
        jaxpeft.apply(model, params, BATCH.ids, rngs={"dropout": KEY}),
        jaxpeft.apply(model, params, BATCH.ids),
    )


@pytest.mark.slow  # it imports peft
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)], ids=str)
def test_gradients_of_osf_are_those_of_peft(shape: tuple[int, int]) -> None:
    import peft
    import torch

    torch.manual_seed(0)
    n_in, n_out = shape
    theirs = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(n_in, n_out)),
        peft.OSFConfig(effective_rank=3, target_modules=["0"]),
    )
    weight = theirs.base_model.model[0].base_layer.weight.detach().numpy()
    base = {"0": {"kernel": jnp.asarray(weight.T)}}
    leaves = jaxpeft.rewrite(jaxpeft.OSF(kept_rank=3), base, KEY)["0"]
    found = theirs.base_model.model[0].osf_svd_params["default"]
    rng = np.random.default_rng(0)
    for name, key in (("V_low", "osf_v"), ("S_low", "osf_s"), ("U_low", "osf_u")):
        moved = leaves[key] + 0.1 * rng.standard_normal(leaves[key].shape).astype(np.float32)
        leaves[key] = moved
        found[name].data = torch.tensor(np.array(moved.T))
    x = rng.standard_normal((5, n_in)).astype(np.float32)
    torch.sum(theirs(torch.tensor(x)) ** 3).backward()
    trained = {key: leaves[key] for key in ("osf_v", "osf_s", "osf_u")}

    def loss(trained: Any) -> Any:
        own = {**leaves, **trained}
        call = Call(own, (jnp.asarray(x),), lambda x: x @ weight.T + bias, lambda: None)
        return jnp.sum(jaxpeft.OSF.compute(call) ** 3)

    bias = theirs.base_model.model[0].base_layer.bias.detach().numpy()
    gradients = jax.grad(loss)(trained)
    for name, key in (("V_low", "osf_v"), ("S_low", "osf_s"), ("U_low", "osf_u")):
        wanted = found[name].grad.numpy().T
        np.testing.assert_allclose(gradients[key], wanted, rtol=1e-3, atol=1e-3)


def test_supertuning_trains_the_entries_of_the_kernel_that_are_largest_or_smallest() -> None:
    kernel = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
    order = np.argsort(-np.abs(kernel.T).reshape(-1))
    for select, wanted in (("largest", order[:7]), ("smallest", order[::-1][:7])):
        method = jaxpeft.SuperTuning(share=0.25, select=select)
        leaves = jaxpeft.rewrite(method, {"a": {"kernel": jnp.asarray(kernel)}}, KEY)["a"]
        np.testing.assert_array_equal(leaves["supertuning_indices"], wanted)


# --------------------------------------------------------------------------------------- refusals


def saved(folder: Path, method: Any, kind: str = "llama") -> Any:
    """Save a fresh adapter; return what loads it."""
    model, base = load(kind)
    jaxpeft.save_adapter(folder, method, jaxpeft.rewrite(method, base, KEY), model)
    (folder / "jaxpeft.json").unlink()  # as PEFT writes a folder, without our hashes
    return lambda: jaxpeft.load_adapter(folder, model, base)


def test_a_matrix_that_glora_does_not_have_must_be_zero_in_a_file(tmp_path: Path) -> None:
    again = saved(tmp_path, jaxpeft.GLoRA(rank=2, targets=("k_proj",)))
    again()
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.k_proj.glora_D.zeros"
    save_file({**tensors, name: tensors[name] + 1}, file)
    with pytest.raises(AdapterError, match=r"k_proj\.glora_D\.zeros: must be zero, since"):
        again()


def test_places_of_supertuning_must_be_in_the_file_and_in_the_kernel(tmp_path: Path) -> None:
    again = saved(tmp_path, jaxpeft.SuperTuning(targets=("k_proj",)))
    file, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.k_proj.supertuning_indices"
    save_file({**tensors, name: tensors[name] + 512}, file)
    with pytest.raises(AdapterError, match="outside of the kernel, which has 512 entries"):
        again()
    edit_json(config, lambda values: values.update(save_precomputed_indices=False))
    with pytest.raises(AdapterError, match="save_precomputed_indices: is false, so the file"):
        again()


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        (jaxpeft.OSF, {"rank_pattern": {"q": 3}}, "rank_pattern: "),
        (jaxpeft.PEANuT, {"r": 4, "act_fn": "relu", "scaling": 1.0, "fan": 1}, "fan: 1"),
        (
            jaxpeft.DEFT,
            {"r": 4, "decomposition_method": "qr", "fan_in_fan_out": True},
            "fan_in_fan_out: True",
        ),
    ],
    ids=["osf", "peanut", "deft"],
)
def test_settings_that_are_not_supported_are_refused(
    method: Any, values: Any, message: str
) -> None:
    _, problems = method.peft.read_options(method, {"target_modules": ["q"], **values})
    (problem,) = problems
    assert problem.startswith(message)
    assert f"is not supported by the {method.name} method" in problem


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jaxpeft.OSF(kept_rank=1.5), "kept_rank: 1.5 is a share above 1"),
        (lambda: jaxpeft.SuperTuning(alpha=3.0), "supertuning.alpha: needs a rank"),
        (lambda: jaxpeft.PEANuT(activation="prelu"), "peanut.activation: must be one of"),
        (
            lambda: jaxpeft.GLoRA(kernel_form="none", coupling_form="none", bias_form="none"),
            "nothing would be trained",
        ),
        (lambda: fresh(jaxpeft.OSF(kept_rank=16)), r"would keep 16 of the 16 singular values of"),
        (
            lambda: fresh(jaxpeft.SuperTuning(share=1e-4)),
            r"share: 0\.0001 of the 1536 entries of .* is less than one",
        ),
    ],
    ids=["share", "alpha", "activation", "nothing", "all kept", "none chosen"],
)
def test_what_cannot_be_trained_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def fresh(method: Any) -> Any:
    """Adapt the tiny decoder."""
    return jaxpeft.rewrite(method, load("llama")[1], KEY)
