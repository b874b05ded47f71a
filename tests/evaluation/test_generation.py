"""Greedy generation: the tokens that transformers generates, up to the first that ends an
answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import pytest

import jaxpeft
from jaxpeft.evaluation import generation
from jaxpeft.evaluation.generation import greedy
from tests.train.runs import tiny_models

__all__ = ["tiny_models"]
PROMPTS = [[2, 7, 9, 11], [2, 30], [2, 40, 41, 42, 43, 44, 45]]
MOST = 12


@pytest.fixture(scope="module")
def theirs(tiny_models: Mapping[str, Path]) -> list[list[int]]:
    """What transformers generates, with no token that ends it."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    made = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {
            "max_new_tokens": MOST,
            "min_new_tokens": MOST,
            "do_sample": False,
            "pad_token_id": 0,
        }
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        made.append(out[0, len(prompt) :].tolist())
    return made


@pytest.mark.parametrize("scan_layers", [False, True])
def test_the_tokens_are_those_of_transformers(
    tiny_models: Mapping[str, Path], theirs: list[list[int]], scan_layers: bool
) -> None:
    model, params = jaxpeft.load(tiny_models["llama"], task="causal_lm", scan_layers=scan_layers)
    assert greedy(model, params, PROMPTS, most=MOST, ends=set()) == theirs


def test_an_answer_ends_before_the_first_token_that_ends_it(
    tiny_models: Mapping[str, Path], theirs: list[list[int]]
) -> None:
    model, params = jaxpeft.load(tiny_models["llama"], task="causal_lm")
    ends = {theirs[0][3], theirs[1][5]}
    wanted = [
        ids[: next((i for i, token in enumerate(ids) if token in ends), MOST)] for ids in theirs
    ]
    assert greedy(model, params, PROMPTS, most=MOST, ends=ends) == wanted
    assert len(wanted[0]) < MOST


def test_the_kernel_of_another_platform_has_no_say(
    tiny_models: Mapping[str, Path], theirs: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = list[str]()
    model, params = jaxpeft.load(tiny_models["llama"], task="causal_lm")
    model = model.clone(options=dataclasses.replace(model.options, attention="splash"))
    real = generation.apply
    monkeypatch.setattr(
        generation,
        "apply",
        lambda model, *args: (seen.append(model.options.attention), real(model, *args))[1],
    )
    assert greedy(model, params, PROMPTS, most=MOST, ends=set()) == theirs
    assert set(seen) == {"xla"}
