"""What other tools let pass in silence, one short test a row of `shared/facts/silent_failures.md`
that concerns adapters.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import AdapterError, ConfigError, JaxpeftError, TargetError
from jaxpeft.export.export import ExportRequest, export
from tests.hub.helpers import assert_bit_equal, edit_json, peft_save, trained

CAUSAL, SEQUENCE, ENCODER = "causal_lm", "sequence_classification", "encoder"
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def llama(reference: Callable[..., Any]) -> Any:
    """A tiny decoder in torch, and here: `(torch reference, model, params)`."""
    torch_model = reference("llama", CAUSAL)
    return (torch_model, *torch_model.load())


def adapted(method: Any, base: Any) -> Any:
    """Return a trained tree."""
    return trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))


def test_row_1_one_target_of_several_that_matches_nothing_is_an_error(
    llama: Any, tmp_path: Path
) -> None:
    torch_model, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj", "v_porj"))
    with pytest.raises(
        TargetError, match=r"targets: 'v_porj' matches no site; did you mean 'v_proj'"
    ):
        jaxpeft.rewrite(method, base, jax.random.key(0))
    # peft says nothing
    peft_save(torch_model.folder, CAUSAL, tmp_path, target_modules=["q_proj", "v_porj"])
    with pytest.raises(AdapterError, match=r"targets: 'v_porj' matches no site"):
        jaxpeft.load_adapter(tmp_path, model, base)


def test_row_1_sites_that_are_adapted_in_part_of_the_layers_are_told(
    llama: Any, caplog: pytest.LogCaptureFixture
) -> None:
    jaxpeft.rewrite(
        jaxpeft.LoRA(targets=("layers.1.self_attn.q_proj",)), llama[2], jax.random.key(0)
    )
    assert "1 of    2  model.layers.*.self_attn.q_proj" in caplog.text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"modules_to_save": ("lm_haed",)},
            "modules_to_save: 'lm_haed' matches no module of the model",
        ),
        ({"layers_to_transform": (1, 2)}, "layers_to_transform: no layer 2; the model has 0 to 1"),
        ({"rank_pattern": {"v_proj": 2}}, "rank_pattern: 'v_proj' matches no adapted site"),
        ({"alpha_pattern": {"v_proj": 2.0}}, "alpha_pattern: 'v_proj' matches no adapted site"),
    ],
)
def test_row_2_what_an_option_names_must_be_there(
    llama: Any, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(JaxpeftError) as caught:
        jaxpeft.rewrite(jaxpeft.LoRA(targets=("q_proj",), **options), llama[2], jax.random.key(0))
    assert text in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["bert", "roberta", "distilbert", "llama", "modernbert", "deberta-v2"]
)
@pytest.mark.representatives("bert", "llama")
def test_row_3_every_leaf_that_is_made_newly_is_trained_and_saved(
    reference: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    folder = reference(kind, ENCODER).folder
    model, base = jaxpeft.load(folder, task=SEQUENCE, num_labels=3)
    _, other = jaxpeft.load(folder, task=SEQUENCE, num_labels=3, seed=1)
    made = {
        path for path, leaf in paths.walk(base) if not np.array_equal(leaf, paths.get(other, path))
    }
    assert made
    method = jaxpeft.LoRA(targets="all-linear")
    params = adapted(method, base)
    mask = dict(paths.walk(jaxpeft.trainable_mask(method, params)))
    assert all(mask[path] for path in made)
    jaxpeft.save_adapter(tmp_path, method, params, model)
    file = load_file(tmp_path / WEIGHTS)
    for name in (f"base_model.model.{paths.hf_names(path)[0]}" for path in made):
        assert name in file
        spoiled = {key: tensor for key, tensor in file.items() if key != name}
        save_file(spoiled, tmp_path / WEIGHTS)  # as peft saves it without a task_type
        with pytest.raises(AdapterError, match=f"missing: {name}"):
            jaxpeft.load_adapter(tmp_path, model, base)


def test_row_4_embeddings_that_are_trained_are_saved_and_must_fit(
    llama: Any, tmp_path: Path
) -> None:
    _, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    params = adapted(method, base)
    jaxpeft.save_adapter(tmp_path, method, params, model)
    assert_bit_equal(jaxpeft.load_adapter(tmp_path, model, base)[1], params)
    name = "base_model.model.model.embed_tokens.weight"
    file = load_file(tmp_path / WEIGHTS)
    save_file(file | {name: np.concatenate([file[name], file[name][:2]])}, tmp_path / WEIGHTS)
    with pytest.raises(
        AdapterError, match=rf"misshaped: {name} is \[101, 32\], must be \[99, 32\]"
    ):
        jaxpeft.load_adapter(tmp_path, model, base)
    with pytest.raises(ConfigError, match=r"trainable_tokens.tokens: 99 is outside the 99 tokens"):
        jaxpeft.rewrite(jaxpeft.TrainableTokens(tokens=(98, 99)), base, jax.random.key(0))


def test_row_11_keys_that_do_not_match_are_an_error_and_nothing_is_loaded(
    llama: Any, tmp_path: Path
) -> None:
    _, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj",))
    jaxpeft.save_adapter(tmp_path, method, adapted(method, base), model)
    file = load_file(tmp_path / WEIGHTS)
    save_file(
        {name.replace(".model.model.", ".model."): t for name, t in file.items()},
        tmp_path / WEIGHTS,
    )
    with pytest.raises(AdapterError) as caught:
        jaxpeft.load_adapter(tmp_path, model, base)
    starts = [problem.split(": ")[1] for problem in caught.value.problems]
    assert starts.count("missing") == starts.count("extra") == len(file)


@pytest.mark.parametrize(
    "change", [{"lora_alpha": None}, {"r": None}, {"r": 4}, {"use_dora": True}]
)
def test_row_12_a_scaling_that_the_file_does_not_give_is_not_guessed(
    llama: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    _, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj",))
    jaxpeft.save_adapter(tmp_path, method, adapted(method, base), model)
    edit_json(tmp_path / "adapter_config.json", lambda config: config.update(change))
    with pytest.raises(AdapterError):
        jaxpeft.load_adapter(tmp_path, model, base)


@pytest.mark.parametrize("other", [{"alpha": 32.0}, {"rslora": True}])
def test_row_12_an_adapter_is_not_saved_with_another_scaling_than_it_was_trained_with(
    llama: Any, tmp_path: Path, other: dict[str, Any]
) -> None:
    _, model, base = llama
    params = adapted(jaxpeft.LoRA(targets=("q_proj",)), base)
    with pytest.raises(AdapterError, match=r"lora_scale is 2 in the tree, the method makes"):
        jaxpeft.save_adapter(
            tmp_path / "out", jaxpeft.LoRA(targets=("q_proj",), **other), params, model
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_row_15_a_merge_says_which_base_it_was_and_how_far_it_is_off(
    llama: Any, tmp_path: Path
) -> None:
    _, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj",))
    jaxpeft.save_adapter(tmp_path / "adapter", method, adapted(method, base), model)
    report = export(
        ExportRequest(tmp_path / "adapter", "merged", tmp_path / "out", dtype="bfloat16")
    )
    record = json.loads((tmp_path / "out" / "jaxpeft_merge.json").read_text())
    assert (
        record["base"]["sha256"]
        == json.loads((tmp_path / "adapter" / "jaxpeft.json").read_text())["base_sha256"]
    )
    assert (record["relative_error"], record["largest_logit_difference"]) == (
        report.error,
        report.gap,
    )
    assert report.error > 0 and report.gap > 0
    with pytest.raises(ConfigError, match=r"an unquantized base .* use --to merged"):
        export(
            ExportRequest(tmp_path / "adapter", "merged_quantized_reference", tmp_path / "other")
        )


@pytest.mark.slow
def test_row_16_what_bfloat16_swallows_is_measured_and_warned_of(
    llama: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, model, base = llama
    method = jaxpeft.LoRA(rank=4, alpha=4.0, targets="all-linear")
    base = paths.map_with_path(lambda _, leaf: leaf.astype(jnp.bfloat16).astype(leaf.dtype), base)
    errors: list[float] = []
    for size in (1.0, 0.01):
        params = jaxpeft.rewrite(method, base, jax.random.key(0))
        params = paths.map_with_path(
            lambda path, leaf, size=size: leaf + size * 0.05 if path[-1] == "lora_b" else leaf,
            params,
        )
        folder = tmp_path / f"adapter {size}"
        jaxpeft.save_adapter(folder, method, params, model)
        caplog.clear()
        errors.append(
            export(
                ExportRequest(folder, "merged", tmp_path / f"out {size}", dtype="bfloat16")
            ).error
            or 0.0
        )
        assert "use --dtype float32, or keep the adapter" in caplog.text
    assert errors[1] > 10 * errors[0] > 0.01
    assert export(ExportRequest(folder, "merged", tmp_path / "exact", dtype="float32")).error == 0


def test_row_18_a_start_in_the_base_leaves_the_base_alone_and_is_saved_as_a_plain_lora(
    llama: Any, tmp_path: Path
) -> None:
    _, model, base = llama
    before = paths.map_with_path(lambda _, leaf: np.array(leaf), base)
    for start in ("pissa", "olora"):
        method = jaxpeft.LoRA(rank=4, targets=("q_proj",), init_weights=start)
        params = adapted(method, base)
        kept = jaxpeft.without_adapter(method, params)
        assert_bit_equal(kept, before)
        jaxpeft.save_adapter(tmp_path / start, method, params, model)
        config = json.loads((tmp_path / start / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"]) == (8, True)
        edit_json(
            tmp_path / start / "adapter_config.json",
            lambda c, start=start: c.update(init_lora_weights=start),
        )
        with pytest.raises(
            AdapterError,
            match=r"changed the base at initialization; save the adapter converted to plain LoRA",
        ):
            jaxpeft.load_adapter(tmp_path / start, model, base)


def test_row_22_arrays_in_any_memory_order_are_written_as_they_are(
    llama: Any, tmp_path: Path
) -> None:
    """Every kernel is a transpose in the file: what is not C-contiguous is what is written."""
    _, model, base = llama
    method = jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("o_proj",))
    params = adapted(method, base)
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    file = load_file(tmp_path / "adapter" / WEIGHTS)
    site = params["model"]["layers"]["0"]["self_attn"]
    prefix = "base_model.model.model.layers.0.self_attn."
    np.testing.assert_array_equal(
        file[f"{prefix}q_proj.lora_A.weight"], np.asarray(site["q_proj"]["lora_a"]).T
    )
    np.testing.assert_array_equal(
        file[f"{prefix}o_proj.weight"], np.asarray(site["o_proj"]["kernel"]).T
    )
    export(ExportRequest(tmp_path / "adapter", "merged", tmp_path / "out"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(
        merged["model.layers.0.self_attn.o_proj.weight"], np.asarray(site["o_proj"]["kernel"]).T
    )
