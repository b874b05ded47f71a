"""Prompt tuning: how a prompt starts."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

import jaxpeft
from jaxpeft.errors import ConfigError
from jaxpeft.train.data_start import Start
from tests.core.helpers import BATCH, load
from tests.methods.interop import case_of, imported, quiet
from tests.models.conftest import reference  # noqa: F401 - a fixture

KEY = jax.random.key(0)


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.representatives("scanned-llama", "unrolled-bert")
def test_a_prompt_starts_as_rows_of_the_word_embedding(kind: str, scan: bool) -> None:
    _, base = load(kind, scan_layers=scan)
    made = (
        base["model"]["embed_tokens"]
        if kind == "llama"
        else base["bert"]["embeddings"]["word_embeddings"]
    )
    rows = np.asarray(made["embedding"])
    drawn = np.asarray(jaxpeft.rewrite(jaxpeft.PromptTuning(), base, KEY)["prompt_embeddings"])
    assert drawn.shape == (20, 32)
    assert all((row == rows).all(1).any() for row in drawn)
    assert len(np.unique(drawn, axis=0)) > 10
    method = jaxpeft.PromptTuning(num_virtual_tokens=5, init_tokens=(7, 98))
    np.testing.assert_array_equal(
        jaxpeft.rewrite(method, base, KEY)["prompt_embeddings"], rows[[7, 98, 7, 98, 7]]
    )
    normal = np.asarray(
        jaxpeft.rewrite(jaxpeft.PromptTuning(init_weights="normal"), base, KEY)["prompt_embeddings"]
    )
    assert abs(normal.std() - 1) < 0.1


@pytest.mark.slow
def test_a_prompt_of_tokens_is_the_tokens_in_front_of_the_row() -> None:
    model, base = load("llama")
    method = jaxpeft.PromptTuning(num_virtual_tokens=3, init_tokens=(7, 8, 9))
    params = jaxpeft.rewrite(method, base, KEY)
    written = np.concatenate([np.tile([7, 8, 9], (3, 1)), BATCH.ids], axis=1)
    wanted = jaxpeft.apply(model, base, written)[:, 3:]
    np.testing.assert_allclose(jaxpeft.apply(model, params, BATCH.ids), wanted, atol=2e-5)


def tokenizer(text: str) -> dict[str, list[int]]:
    return {"input_ids": [2, *(ord(letter) - 60 for letter in text)] if text.strip() else []}


def test_a_prompt_starts_as_the_tokens_of_a_text() -> None:
    model, base = load("llama")
    method = jaxpeft.PromptTuning(num_virtual_tokens=5, init_text="abc")
    params = jaxpeft.rewrite(method, base, KEY)
    begun, started = method.start(params, Start(model, base, KEY, tokenizer))
    assert begun == method
    rows = np.asarray(base["model"]["embed_tokens"]["embedding"])
    np.testing.assert_array_equal(started["prompt_embeddings"], rows[[2, 37, 38, 39, 2]])
    same = jaxpeft.PromptTuning(num_virtual_tokens=5)
    assert same.start(params, Start(model, base, KEY, tokenizer)) == (same, params)
    with pytest.raises(ConfigError, match="init_text: the model has no tokenizer; use init_tokens"):
        method.start(params, Start(model, base, KEY))
    with pytest.raises(ConfigError, match="init_text: ' ' has no tokens; use init_tokens"):
        jaxpeft.PromptTuning(init_text=" ").start(params, Start(model, base, KEY, tokenizer))


def test_starts_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"prompt\.init_tokens: cannot be used with init_text; remove one of them"
    ):
        jaxpeft.PromptTuning(init_tokens=(1,), init_text="a")
    with pytest.raises(
        ConfigError,
        match=r"prompt\.init_text: cannot be used with init_weights; remove one of them",
    ):
        jaxpeft.PromptTuning(init_weights="normal", init_text="a")
    with pytest.raises(ConfigError, match="init_tokens: 99 is outside the vocabulary of 99"):
        jaxpeft.rewrite(jaxpeft.PromptTuning(init_tokens=(99,)), load("llama")[1], KEY)
    with pytest.raises(ConfigError, match=r"init_tokens\[?.*: must be at least 0, is -1"):
        jaxpeft.PromptTuning(init_tokens=(-1,))


@quiet
def test_how_a_prompt_began_is_not_read(reference: Any, tmp_path: Any) -> None:
    options = {"num_virtual_tokens": 3, "prompt_tuning_init": "SAMPLE_VOCAB"}
    gap, method = imported(
        reference, tmp_path, case_of(None, "llama", "PromptTuningConfig", **options)
    )
    assert gap < 1e-4
    assert method == jaxpeft.PromptTuning(num_virtual_tokens=3)
