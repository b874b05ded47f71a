"""Tokens are chosen as transformers chooses them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.inference.sampling import Sampling

VOCAB, DRAWS = 12, 20_000


def logits(seed: int = 0) -> np.ndarray[Any, Any]:
    return (2 * np.random.default_rng(seed).standard_normal((1, VOCAB))).astype(np.float32)


def draw(sampling: Sampling, scores: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the shares of each token among many draws."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), jnp.arange(DRAWS))
    rows = jnp.broadcast_to(jnp.asarray(scores), (DRAWS, VOCAB))
    choose = jax.jit(lambda rows, keys: sampling.rule.choose(rows, None, keys, sampling.numbers))
    tokens, _ = choose(rows, keys)
    return np.bincount(np.asarray(tokens), minlength=VOCAB) / DRAWS


def choose_one(
    sampling: Sampling, scores: np.ndarray[Any, Any], seen: np.ndarray[Any, Any] | None = None
) -> Any:
    key = jax.random.split(jax.random.key(0), 1)
    known = None if seen is None else jnp.asarray(seen)
    return sampling.rule.choose(jnp.asarray(scores), known, key, sampling.numbers)


def expected(scores: np.ndarray[Any, Any], options: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Return the distribution that transformers samples from."""
    import torch
    from transformers import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    found = torch.tensor(scores)
    for name, kind in warpers.items():
        if name in options:
            found = kind(options[name])(torch.zeros((1, 1), dtype=torch.long), found)
    return torch.softmax(found, -1)[0].numpy()


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.5, "top_k": 3},
        {"temperature": 1.0, "top_k": 100},
        {"temperature": 1.0, "top_p": 0.7},
        {"temperature": 2.0, "top_p": 0.3},
        {"temperature": 1.0, "min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(options: dict[str, Any]) -> None:
    scores = logits()
    wanted, found = expected(scores, options), draw(Sampling(**options), scores)
    assert set(np.flatnonzero(found)) <= set(np.flatnonzero(wanted))
    np.testing.assert_allclose(found, wanted, atol=4 * np.sqrt(0.25 / DRAWS))


def test_the_penalty_is_that_of_transformers() -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = logits(1)
    tokens = torch.tensor([[int(scores.argmax()), int(scores.argmin())]])
    wanted = RepetitionPenaltyLogitsProcessor(1.7)(tokens, torch.tensor(scores))
    seen = np.zeros((1, VOCAB), bool)
    seen[0, tokens.numpy()[0]] = True
    sampling = Sampling(repetition_penalty=1.7)
    found, log_prob = choose_one(sampling, scores, seen)
    assert int(found[0]) == int(wanted.argmax()) != int(scores.argmax())
    wanted_log_prob = torch.log_softmax(torch.tensor(scores), -1)[0, int(found[0])]
    np.testing.assert_allclose(log_prob[0], wanted_log_prob, rtol=1e-5)  # before the penalty


def test_temperature_zero_takes_the_most_likely_token() -> None:
    scores = logits(2)
    assert int(choose_one(Sampling(), scores)[0][0]) == scores.argmax()


@pytest.mark.parametrize("temperature", [1e-38, 1e-6])
def test_a_tiny_temperature_takes_the_most_likely_token_too(temperature: float) -> None:
    scores = 100 * logits(3)
    assert int(choose_one(Sampling(temperature), scores)[0][0]) == scores.argmax()


def test_numbers_of_numpy_and_jax_are_numbers() -> None:
    given: Any = (jnp.float32(0.5), np.int64(3), np.float32(0.5))
    found = Sampling(*given)
    assert (found.temperature, found.top_k, found.top_p) == (0.5, 3, 0.5)
    assert hash(found)


def test_options_out_of_range_are_refused_together() -> None:
    with pytest.raises(ConfigError) as error:
        Sampling(temperature=-1, top_k=0, top_p=1.5, min_p=0.0, repetition_penalty=0.0)
    assert error.value.problems == (
        "temperature: must be a number of at least 0, is -1",
        "top_k: must be an integer of at least 1, is 0",
        "top_p: must be above 0 and at most 1, is 1.5",
        "min_p: must be above 0 and at most 1, is 0.0",
        "repetition_penalty: must be a number above 0, is 0.0",
    )
    with pytest.raises(ConfigError, match="top_p: has no effect at temperature 0"):
        Sampling(top_p=0.9)
