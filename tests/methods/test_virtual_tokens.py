"""What all methods with virtual tokens show: packing, banks, foreign modules, files, lengths."""

from __future__ import annotations

import dataclasses
import json
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft import models
from jaxpeft.core.bank import bank
from jaxpeft.errors import AdapterError, ConfigError, DataError
from jaxpeft.models.base import ModelOptions
from jaxpeft.processes.signals import Stopped
from jaxpeft.train import job
from jaxpeft.train.data_start import Start
from tests.checkpoint.test_resume import stop_at
from tests.conformance.conftest import moved
from tests.core.helpers import BATCH, CLASSIFIER, load
from tests.hub.helpers import edit_json, peft_load, peft_save
from tests.methods.interop import quiet
from tests.models.conftest import (  # noqa: F401 - a fixture
    LENGTHS,
    Reference,
    forward,
    make_batch,
    reference,
    tiny_config,
)
from tests.train.runs import make_config, tiny_models  # noqa: F401 - fixtures

MARK = 1e-4
METHODS: dict[str, Any] = {
    "prefix": jaxpeft.PrefixTuning(num_virtual_tokens=5),
    "projection": jaxpeft.PrefixTuning(
        num_virtual_tokens=5, projection=True, encoder_hidden_size=12
    ),
    "prompt": jaxpeft.PromptTuning(num_virtual_tokens=5),
    "lstm": jaxpeft.PTuning(num_virtual_tokens=5, encoder="lstm", encoder_hidden_size=12),
}
every_method = pytest.mark.parametrize(
    "method", [pytest.param(m, id=name) for name, m in METHODS.items()]
)


def adapted(method: Any, base: Any, seed: int = 0) -> Any:
    return moved(method, jaxpeft.rewrite(method, base, jax.random.key(seed)), seed=seed)


def windowed(scan: bool) -> Any:
    """Return a tiny mistral, whose windows are shorter than its rows."""
    config = tiny_config("mistral", sliding_window=6)
    model = models.build(
        config, ModelOptions(task="causal_lm", num_labels=None, dtype=jnp.float32, scan_layers=scan)
    )
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]


# -------------------------------------------------------------------------------------- packed rows


def packed() -> tuple[Any, Any]:
    """Return the two shorter rows of the batch in one row, and which is which."""
    parts = [BATCH.ids[row, : LENGTHS[row]] for row in (1, 2)]
    ids = np.concatenate(parts)
    return ids[None], np.repeat([0, 1], [len(part) for part in parts])[None].astype(np.int32)


@every_method
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.representatives("llama-prefix")
def test_a_packed_row_of_a_decoder_gives_the_logits_of_its_texts_alone(
    method: Any, kind: str
) -> None:
    model, base = load("llama") if kind == "llama" else windowed(scan=True)
    params = adapted(method, base)
    ids, segments = packed()
    run = jax.jit(partial(jaxpeft.apply, model))
    together = np.asarray(run(params, ids, segment_ids=segments))[0]
    alone = [run(params, BATCH.ids[row : row + 1, : LENGTHS[row]])[0] for row in (1, 2)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=2e-5)
    assert np.abs(together - run(base, ids, segment_ids=segments)[0]).max() > 0.02


@pytest.mark.slow
def test_an_encoder_packs_texts_behind_a_past_and_not_behind_a_prompt() -> None:
    model, base = load("bert", "token_classification")
    ids, segments = packed()
    params = adapted(METHODS["prefix"], base)
    run = jax.jit(partial(jaxpeft.apply, model))
    together = np.asarray(run(params, ids, segment_ids=segments))[0]
    alone = [run(params, BATCH.ids[row : row + 1, : LENGTHS[row]])[0] for row in (1, 2)]
    np.testing.assert_allclose(together, np.concatenate(alone), atol=2e-5)
    with pytest.raises(
        DataError,
        match="segment_ids: a prompt attends to all tokens of a row, so rows cannot be packed",
    ):
        jaxpeft.apply(model, adapted(METHODS["prompt"], base), ids, segment_ids=segments)


# --------------------------------------------------------------------------------- several adapters


@every_method
@pytest.mark.representatives("prompt", "prefix")
def test_each_row_of_a_batch_takes_the_virtual_tokens_of_its_own_adapter(method: Any) -> None:
    model, base = load("llama", scan_layers=True)
    trees = [adapted(method, base, seed) for seed in range(2)]
    both = bank([(method, tree) for tree in trees])
    run = jax.jit(partial(jaxpeft.apply, model, both, BATCH.ids, BATCH.mask))
    alone = [np.asarray(forward(model, tree, BATCH.ids, BATCH.mask)) for tree in trees]
    rows = run(adapter=jnp.asarray([1, 0, 1]))
    for row, which in enumerate((1, 0, 1)):
        np.testing.assert_allclose(rows[row], alone[which][row], atol=2e-5)
    np.testing.assert_allclose(run(adapter=1), alone[1], atol=2e-5)


def test_a_past_and_a_prompt_stand_one_behind_the_other() -> None:
    model, base = load("llama")
    front, behind = (7, 8, 9), (20, 21)
    prefix = jaxpeft.PrefixTuning(num_virtual_tokens=3, init_tokens=front)
    prompt = jaxpeft.PromptTuning(num_virtual_tokens=2, init_tokens=behind)
    run = Start(model, base, jax.random.key(0))
    tree = prefix.start(jaxpeft.rewrite(prefix, base, jax.random.key(0)), run)[1]
    tree = {
        **jaxpeft.rewrite(prompt, base, jax.random.key(0)),
        **tree,
    }  # the tree alone decides, whatever made its leaves
    written = np.concatenate([np.tile([*front, *behind], (3, 1)), BATCH.ids], axis=1)
    compute = jax.jit(partial(jaxpeft.apply, model))
    wanted = compute(base, written)[:, 5:]
    np.testing.assert_allclose(compute(tree, BATCH.ids), wanted, atol=2e-5)


# ------------------------------------------------------------------------------------ other modules


class Foreign(nn.Module):
    """Somebody else's model, with names like ours."""

    @nn.compact
    def __call__(self, ids: Any, **more: Any) -> Any:
        x = nn.Embed(9, 8, name="embed_tokens")(ids)
        return nn.Dense(8, name="k_proj")(x)


@every_method
def test_a_module_that_takes_no_virtual_tokens_is_refused(method: Any) -> None:
    model, ids = Foreign(), jnp.ones((1, 3), jnp.int32)
    params = jaxpeft.rewrite(
        method, model.init(jax.random.key(0), ids)["params"], jax.random.key(0)
    )
    text = (
        rf"Foreign.__call__ has no argument 'virtual', which the {method.name} method passes; it"
        r" works on the models of"
    )
    with pytest.raises(ConfigError, match=text):
        jaxpeft.apply(model, params, ids)


def test_a_tree_without_keys_or_words_is_refused() -> None:
    kernel = {"kernel": jnp.ones((4, 4))}
    with pytest.raises(
        ConfigError,
        match=r"key projections \(k_proj, key, k_lin, qkv_proj\) are not in the tree",
    ):
        jaxpeft.rewrite(METHODS["prefix"], {"dense": kernel}, jax.random.key(0))
    with pytest.raises(ConfigError, match="key projections are 4 and 6 wide"):
        jaxpeft.rewrite(
            METHODS["prefix"],
            {"a": {"key": kernel}, "b": {"key": {"kernel": jnp.ones((4, 6))}}},
            jax.random.key(0),
        )
    for name in ("prompt", "lstm"):
        with pytest.raises(
            ConfigError,
            match=r"word embedding \(embed_tokens, word_embeddings, tok_embeddings, wte\) is not in",
        ):
            jaxpeft.rewrite(METHODS[name], {"a": {"key": kernel}}, jax.random.key(0))


def test_rows_that_leave_no_place_for_the_virtual_tokens_are_refused() -> None:
    model, base = load("bert")
    params = jaxpeft.rewrite(METHODS["prompt"], base, jax.random.key(0))
    with pytest.raises(
        DataError,
        match="a row has 36 tokens and 5 virtual ones, but the bert model supports at most 40",
    ):
        jaxpeft.apply(model, params, np.full((1, 36), 5))


# -------------------------------------------------------------------------------------------- files

CASES: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "llama left": ("llama", "causal_lm", "left", {}),
    "llama whole": ("llama", "causal_lm", "none", {}),
    "qwen3": ("qwen3", "causal_lm", "right", {}),
    "mistral": ("mistral", "causal_lm", "left", {"sliding_window": 6}),
    "bert tokens": ("bert", "token_classification", "left", {}),
    "bert encoder": ("bert", "encoder", "right", {}),
    "bert left": ("bert", "sequence_classification", "left", {}),
    "roberta": ("roberta", "sequence_classification", "right", {}),
    "roberta left": ("roberta", "sequence_classification", "left", {}),
    "roberta tokens": ("roberta", "token_classification", "left", {}),
    "llama classes": ("llama", "sequence_classification", "left", {}),
}
KINDS = {
    "prefix": (METHODS["prefix"], "PrefixTuningConfig"),
    "prompt": (METHODS["prompt"], "PromptTuningConfig"),
}


@quiet
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.representatives("mistral-prefix")
def test_models_tasks_and_paddings_against_the_real_peft(
    reference: Any,
    tmp_path: Any,
    record_property: Any,
    name: str,
    case: str,
) -> None:
    kind, task, side, switches = CASES[case]
    method, config = KINDS[name]
    torch_model, batch = reference(kind, task, **switches), make_batch(side)
    plain = torch_model(batch)
    gaps: list[float] = []

    def check(theirs: Any, model: Any, params: Any) -> None:
        wanted = np.asarray(Reference(tmp_path, task, theirs)(batch))
        wanted = wanted[:, -batch.ids.shape[1] :] if wanted.ndim == 3 else wanted
        found = np.asarray(forward(model, params, batch.ids, batch.mask))
        assert found.shape == wanted.shape == plain.shape
        real = batch.mask.astype(bool) if wanted.ndim == 3 else np.ones(len(wanted), bool)
        assert np.abs(wanted - plain)[real].max() > 0.02
        gaps.append(
            float(np.abs(found - wanted)[real].max()) / max(1.0, float(np.abs(wanted).max()))
        )

    model, base = torch_model.load()
    params = adapted(method, base)
    jaxpeft.save_adapter(tmp_path / "ours", method, params, model)
    check(peft_load(torch_model.folder, task, tmp_path / "ours"), model, params)
    theirs = peft_save(
        torch_model.folder, task, tmp_path / "theirs", config=config, num_virtual_tokens=5
    )
    for scan in (False, True):
        model, base = torch_model.load(scan_layers=scan)
        check(theirs, model, jaxpeft.load_adapter(tmp_path / "theirs", model, base)[1])
    record_property("gap", max(gaps))
    assert max(gaps) <= MARK


@quiet
def test_distilbert_takes_prompts_as_the_real_peft_does(reference: Any, tmp_path: Any) -> None:
    torch_model, batch = reference("distilbert", CLASSIFIER), make_batch("right")
    model, base = torch_model.load()
    params = adapted(METHODS["prompt"], base)
    jaxpeft.save_adapter(tmp_path, METHODS["prompt"], params, model)
    wanted = Reference(tmp_path, CLASSIFIER, peft_load(torch_model.folder, CLASSIFIER, tmp_path))(
        batch
    )
    np.testing.assert_allclose(forward(model, params, batch.ids, batch.mask), wanted, atol=1e-5)


@pytest.mark.slow
@quiet
def test_explicit_positions_are_shifted_by_a_prefix_as_in_the_real_peft(
    reference: Any, tmp_path: Any
) -> None:
    torch_model, batch = reference("llama", "causal_lm"), make_batch("left")
    model, base = torch_model.load()
    params = adapted(METHODS["prefix"], base)
    jaxpeft.save_adapter(tmp_path, METHODS["prefix"], params, model)
    where = np.clip(np.cumsum(batch.mask, 1) - 1, 0, None)
    theirs = Reference(tmp_path, "causal_lm", peft_load(torch_model.folder, "causal_lm", tmp_path))
    wanted, counted = theirs(batch, position_ids=where), theirs(batch)
    found = np.asarray(jaxpeft.apply(model, params, batch.ids, batch.mask, position_ids=where))
    real = batch.mask.astype(bool)
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)
    assert np.abs(wanted - counted)[real].max() > 1e-3


@pytest.mark.slow
@quiet
def test_a_llama_classifier_reads_the_last_token_where_the_real_peft_reads_the_last_place(
    reference: Any,
    tmp_path: Any,
) -> None:
    """`transformers` cannot tell padding where it is given embeddings, so rows padded on the right
    differ behind a prompt.
    """
    torch_model, batch = reference("llama", CLASSIFIER), make_batch("right")
    model, base = torch_model.load()
    params = adapted(METHODS["prompt"], base)
    jaxpeft.save_adapter(tmp_path, METHODS["prompt"], params, model)
    theirs = Reference(tmp_path, CLASSIFIER, peft_load(torch_model.folder, CLASSIFIER, tmp_path))(
        batch
    )
    found = np.asarray(forward(model, params, batch.ids, batch.mask))
    full = [length == batch.ids.shape[1] for length in LENGTHS]
    np.testing.assert_allclose(found[full], theirs[full], atol=1e-5)
    assert np.abs(found - theirs)[np.invert(full)].max() > 0.02
    for row, length in enumerate(LENGTHS):  # what the row gives by itself, in the real peft as well
        alone = jax.jit(partial(jaxpeft.apply, model))(params, batch.ids[row : row + 1, :length])
        np.testing.assert_allclose(found[row], alone[0], atol=1e-5)


@every_method
@pytest.mark.parametrize("kind", ["qwen3", "bert"])
@pytest.mark.representatives("bert-lstm", "qwen3-prefix", "qwen3-projection", "bert-prompt")
def test_a_file_holds_one_table_and_the_sizes_that_peft_asks_for(
    reference: Any,
    tmp_path: Any,
    method: Any,
    kind: str,
) -> None:
    torch_model = reference(kind, CLASSIFIER)
    model, base = torch_model.load(scan_layers=True)
    jaxpeft.save_adapter(tmp_path, method, adapted(method, base), model)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    sizes = {key: config[key] for key in ("token_dim", "num_layers", "num_attention_heads")}
    past = isinstance(method, jaxpeft.PrefixTuning)
    heads, width = (2, 32) if kind == "qwen3" and past else (4, 32)  # of qwen3 two key heads of 16
    assert sizes == {"token_dim": width, "num_layers": 2, "num_attention_heads": heads}
    assert (config["num_virtual_tokens"], config["num_transformer_submodules"]) == (5, 1)
    assert config["inference_mode"] is True
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head = {"bert": {"base_model.classifier.weight", "base_model.classifier.bias"}}.get(
        kind, {"base_model.score.weight"}
    )
    assert tensors.keys() == {"prompt_embeddings", *head}
    assert tensors["prompt_embeddings"].shape == (5, 2 * 2 * width if past else 32)


@pytest.mark.parametrize("kind", ["prefix", "prompt"])
def test_what_a_file_says_and_is_not_so_is_refused(
    reference: Any, tmp_path: Any, kind: str
) -> None:
    torch_model = reference("llama", "causal_lm")
    model, base = torch_model.load()
    method = METHODS[kind]

    def problems(change: Any) -> str:
        jaxpeft.save_adapter(tmp_path, method, adapted(method, base), model)
        edit_json(tmp_path / "adapter_config.json", change)
        with pytest.raises(AdapterError) as caught:
            jaxpeft.load_adapter(tmp_path, model, base)
        return str(caught.value)

    assert "num_virtual_tokens: is not set" in problems(
        lambda config: config.pop("num_virtual_tokens")
    )
    assert "num_transformer_submodules: 2 is not supported" in problems(
        lambda config: config.update(num_transformer_submodules=2)
    )
    assert "prompt_embeddings is [5, " in problems(
        lambda config: config.update(num_virtual_tokens=6)
    )
    assert "something: 3 is not supported" in problems(lambda config: config.update(something=3))


@every_method
def test_a_tree_that_the_method_would_not_have_made_is_not_saved(
    reference: Any, tmp_path: Any, method: Any
) -> None:
    model, base = reference("llama", "causal_lm").load()
    other = type(method)(num_virtual_tokens=4)
    with pytest.raises(
        AdapterError, match=r"_embeddings: is \[4, .*\] in the tree, the method makes \[5, "
    ):
        jaxpeft.save_adapter(
            tmp_path, method, jaxpeft.rewrite(other, base, jax.random.key(0)), model
        )


# --------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("text", jaxpeft.PrefixTuning(num_virtual_tokens=4, init_tokens=(7, 8))),
        ("text", jaxpeft.PromptTuning(num_virtual_tokens=4, init_text="word1 word2")),
        ("single", jaxpeft.PTuningV2(num_virtual_tokens=4, projection=True)),
    ],
    ids=["prefix", "prompt", "ptuning_v2"],
)
def test_a_run_stopped_and_gone_on_with_is_the_run(
    make_config: Any,
    tmp_path: Any,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    method: Any,
) -> None:
    packed = {"data__packing": True} if kind == "text" else {}
    made = make_config(
        kind, train__steps=4, checkpoint__every_steps=2, evaluation__every_steps=2, **packed
    )
    config = dataclasses.replace(made, method=method)
    whole = job.run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Stopped):
            job.run(config, tmp_path / "parts")
    parts = job.run(config, tmp_path / "parts")
    jax.tree.map(np.testing.assert_array_equal, parts.params, whole.params)
    assert "prompt_embeddings" in load_file(
        tmp_path / "parts" / "adapter" / "adapter_model.safetensors"
    )


def test_a_length_that_leaves_no_place_is_refused_before_weights_are_read(
    make_config: Any, tmp_path: Any
) -> None:
    made = make_config(data__max_length=37)
    config = dataclasses.replace(made, method=METHODS["prefix"])
    text = "rows have 37 tokens and 5 virtual ones, but the model has 40 positions; set it to 35 or less"
    with pytest.raises(ConfigError, match=text):
        job.run(config, tmp_path)
