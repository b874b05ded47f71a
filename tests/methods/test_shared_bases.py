"""VeRA, PVeRA and RandLora: random matrices that all sites share, in PEFT's files and cut to the size of a
site.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core.method import Call
from jaxpeft.core.tree import combine
from jaxpeft.errors import AdapterError
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, leaves, load, run
from tests.hub.helpers import edit_json
from tests.methods.interop import case_of, exported, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

pytestmark = [
    quiet,
    # peft 0.21 copies RandLora's bases to every site of a file, and misses the copies elsewhere
    pytest.mark.filterwarnings(
        "ignore:Found missing adapter keys .*randlora_[AB].default.*:UserWarning"
    ),
]
WIDE = r".*\.(k_proj|up_proj|down_proj)"  # 32 to 16, 32 to 48, and 48 to 32
BERT = r".*\.(query|intermediate\.dense|output\.dense)"

VARIANTS: dict[str, tuple[Any, str, str, dict[str, Any]]] = {
    "vera sizes": (
        jaxpeft.VeRA(rank=8, targets=WIDE),
        "llama",
        "VeraConfig",
        {"r": 8, "target_modules": WIDE},
    ),
    "vera biases": (
        jaxpeft.VeRA(rank=8, targets=BERT, bias="vera_only", dropout=0.1, d_initial=0.2),
        "bert",
        "VeraConfig",
        {
            "r": 8,
            "target_modules": BERT,
            "bias": "vera_only",
            "vera_dropout": 0.1,
            "d_initial": 0.2,
        },
    ),
    "pvera biases": (
        jaxpeft.PVeRA(rank=8, targets=BERT, bias="pvera_only", dropout=0.1, d_initial=0.2),
        "bert",
        "PveraConfig",
        {
            "r": 8,
            "target_modules": BERT,
            "bias": "pvera_only",
            "pvera_dropout": 0.1,
            "d_initial": 0.2,
        },
    ),
    "randlora sizes": (
        jaxpeft.RandLora(rank=5, alpha=1.0, targets=WIDE),
        "llama",
        "RandLoraConfig",
        {"r": 5, "randlora_alpha": 1, "target_modules": WIDE},
    ),
    "randlora biases": (
        jaxpeft.RandLora(rank=5, alpha=1.0, targets=BERT, bias="all", dropout=0.1),
        "bert",
        "RandLoraConfig",
        {
            "r": 5,
            "randlora_alpha": 1,
            "target_modules": BERT,
            "bias": "all",
            "randlora_dropout": 0.1,
        },
    ),
    "randlora sparse": (
        jaxpeft.RandLora(rank=8, alpha=1.0, targets=WIDE, bases="sparse"),
        "llama",
        "RandLoraConfig",
        {"r": 8, "randlora_alpha": 1, "target_modules": WIDE, "sparse": True},
    ),
    "randlora very sparse": (
        jaxpeft.RandLora(rank=8, alpha=1.0, targets=WIDE, bases="very_sparse"),
        "llama",
        "RandLoraConfig",
        {"r": 8, "randlora_alpha": 1, "target_modules": WIDE, "very_sparse": True},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.representatives("vera biases")
def test_variants_go_both_ways(reference: Any, tmp_path: Path, name: str) -> None:
    method, kind, config, options = VARIANTS[name]
    case = case_of(method, kind, config, size=0.1, **options)
    assert exported(reference, tmp_path / "ours", case) < 1e-5
    far, found = imported(reference, tmp_path / "theirs", case)
    assert far < 1e-5
    assert found == method


METHODS = [
    jaxpeft.VeRA(rank=8, targets=WIDE),
    jaxpeft.RandLora(rank=5, alpha=1.0, targets=WIDE),
    jaxpeft.PVeRA(rank=8, targets=WIDE),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=["vera", "randlora", "pvera"])


def replaced(method: Any, **options: Any) -> Any:
    """Return the method with other options."""
    return dataclasses.replace(method, **options)


@each_method
@pytest.mark.representatives("vera")
def test_layers_that_are_not_adapted_compute_the_base_and_get_no_gradient(method: Any) -> None:
    method = replaced(method, targets=("k_proj", "down_proj"), layers_to_transform=(1,))
    model, base = load("llama", scan_layers=True)
    params = moved(method, jaxpeft.rewrite(method, base, jax.random.key(0)), size=0.1)
    trainable, frozen = jaxpeft.partition(params, jaxpeft.trainable_mask(method, params))
    grads = jax.jit(
        jax.grad(lambda t: jnp.sum(jnp.square(jaxpeft.apply(model, combine(t, frozen), BATCH.ids))))
    )(trainable)
    for name, leaf in leaves(grads).items():
        assert not leaf[0].any(), name
        assert leaf[1].any(), name
    np.testing.assert_allclose(
        run(model, jaxpeft.merge(method, params)), run(model, params), atol=1e-4
    )


@each_method
def test_what_peft_cannot_exclude_is_left_out_of_the_named_targets(
    reference: Any,
    tmp_path: Path,
    method: Any,
) -> None:
    case = case_of(
        replaced(method, exclude=("model.layers.0.self_attn.k_proj",)), "llama", "", size=0.1
    )
    assert exported(reference, tmp_path, case) < 1e-5


@each_method
def test_files_without_the_shared_matrices_are_refused(
    reference: Any, tmp_path: Path, method: Any
) -> None:
    model, base = reference("llama", "causal_lm").load()
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(save_projection=False))
    with pytest.raises(
        AdapterError,
        match="save_projection: is false, so the shared random matrices are not in the file",
    ):
        jaxpeft.load_adapter(tmp_path, model, base)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(save_projection=True))
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("_A")}, file)
    with pytest.raises(AdapterError, match=r"missing: base_model\.(vera|randlora|pvera)_A"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_a_copy_at_a_site_that_is_another_matrix_is_refused(reference: Any, tmp_path: Path) -> None:
    model, base = reference("llama", "causal_lm").load()
    method = METHODS[1]
    jaxpeft.save_adapter(tmp_path, method, jaxpeft.rewrite(method, base, jax.random.key(0)), model)
    (tmp_path / "jaxpeft.json").unlink()  # as PEFT writes a folder, without our hashes
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.0.self_attn.k_proj.randlora_A"
    save_file({**tensors, name: tensors["base_model.randlora_A"].copy()}, file)
    jaxpeft.load_adapter(tmp_path, model, base)
    save_file({**tensors, name: tensors["base_model.randlora_A"] + 1}, file)
    with pytest.raises(AdapterError, match=f"extra: {name}"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_the_bases_are_as_wide_as_the_widest_site_and_of_unit_variance() -> None:
    base = load("llama")[1]
    params = jaxpeft.rewrite(METHODS[0], base, jax.random.key(0))
    assert params["vera_a"].shape == (48, 8)
    assert params["vera_b"].shape == (8, 48)
    for kind, zeros in (("dense", 0.0), ("sparse", 2 / 3), ("very_sparse", 1 - 48**-0.5)):
        params = jaxpeft.rewrite(replaced(METHODS[1], bases=kind), base, jax.random.key(0))
        assert params["randlora_a"].shape == (5, 1, 48)
        assert params["randlora_b"].shape == (48, 10, 5)
        for name in ("randlora_a", "randlora_b"):
            np.testing.assert_allclose(np.std(params[name]), 1, atol=1e-5)
        assert abs(float(np.mean(np.asarray(params["randlora_b"]) == 0)) - zeros) < 0.05


def test_pvera_draws_hidden_values_in_training_only() -> None:
    rng = np.random.default_rng(0)
    x, a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((6,), (9, 8), (4, 7)))
    d, last = (rng.standard_normal(n).astype(np.float32) for n in (8, 5))
    leaves = {"pvera_a": a, "pvera_b": b, "pvera_lambda_d": d, "pvera_lambda_b": last}
    rows = jnp.tile(x, (20000, 1))
    call = Call(
        {name: jnp.asarray(leaf) for name, leaf in leaves.items()},
        (rows,),
        base=lambda x: jnp.zeros((len(x), 5), x.dtype),
        kernel=lambda: None,
    )
    mean, log_variance = np.split(x @ a[:6] * d, 2)
    quiet = np.asarray(jaxpeft.PVeRA.compute(call))
    np.testing.assert_allclose(quiet[0], mean @ b[:, :5] * last, rtol=1e-4, atol=1e-5)
    noisy = dataclasses.replace(call, dropout_key=lambda: jax.random.key(0))
    drawn = np.asarray(jaxpeft.PVeRA.compute(noisy))
    spread = np.sqrt(np.exp(log_variance) @ np.square(b[:, :5])) * np.abs(last)
    np.testing.assert_allclose(drawn.std(0), spread, rtol=0.03)
    np.testing.assert_allclose((drawn.mean(0) - quiet[0]) / spread, 0, atol=0.03)


def test_what_is_refused_by_config() -> None:
    for method, config in ((jaxpeft.VeRA, {}), (jaxpeft.RandLora, {"r": 4})):
        _, problems = method.peft.read_options(
            method, {"target_modules": ["q"], "fan_in_fan_out": True, **config}
        )
        assert problems[0].startswith("fan_in_fan_out: True is not supported")
        assert problems[1].endswith("is not set; use the value of the adapter's training")
