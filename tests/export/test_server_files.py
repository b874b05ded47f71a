"""What the targets for servers refuse, with the reason and a target that can hold it."""

from __future__ import annotations

import pytest

import jaxpeft
from jaxpeft.errors import ExportError
from jaxpeft.export import server_files
from tests.export.making import CAUSAL, LORA, REFUSED, SEQUENCE

SERVERS = {"vllm": "vLLM", "gguf-lora": "llama.cpp", "mlx": "MLX-LM"}


@pytest.mark.parametrize("to", SERVERS)
@pytest.mark.parametrize(("method", "why", "instead"), REFUSED.values(), ids=REFUSED)
@pytest.mark.representatives("ia3-vllm", "prefix-mlx", "saved modules-gguf-lora", "biases-vllm")
def test_what_is_no_low_rank_update_is_refused(make, tmp_path, method, why, instead, to):
    made = make(method, "llama", CAUSAL)
    text = made.refused(tmp_path / "out", to=to)
    assert text.startswith(f"--to {to}: {SERVERS[to]} cannot hold it: ")
    assert f"{why}; use --to {instead}" in text
    made.export(tmp_path / "out", instead)


@pytest.mark.parametrize("to", SERVERS)
def test_a_classifier_is_refused_with_every_reason(make, tmp_path, to):
    text = make(LORA, "bert", SEQUENCE).refused(tmp_path / "out", to=to)
    assert "the task is sequence_classification, not causal_lm; use --to merged" in text
    assert "modules_to_save is ['classifier'], which are trained in full" in text


@pytest.mark.parametrize("to", SERVERS)
def test_added_tokens_are_refused(make, tmp_path, to):
    made = make(LORA, "llama", CAUSAL, vocab_size=103)
    text = made.refused(tmp_path / "out", to=to)
    assert (
        "the model has 4 added tokens, which the base of a server has not; use --to merged" in text
    )


@pytest.mark.parametrize("to", ["vllm", "gguf-lora"])
def test_a_magnitude_is_refused(make, tmp_path, to):
    made = make(jaxpeft.DoRA(rank=4, targets=("q_proj",)), "llama", CAUSAL)
    text = made.refused(tmp_path / "out", to=to)
    assert "model.layers.0.self_attn.q_proj has a magnitude, as in DoRA; use --to merged" in text


def test_magnitudes_of_some_modules_are_refused(make, tmp_path):
    both = jaxpeft.Mixed(
        methods=(jaxpeft.DoRA(targets=("q_proj",)), jaxpeft.LoRA(targets=("k_proj",)))
    )
    text = make(both, "llama", CAUSAL).refused(tmp_path / "out", to="mlx")
    assert "some modules have a magnitude, as in DoRA, and others have none" in text


@pytest.mark.parametrize("to", SERVERS)
def test_a_tied_embedding_that_is_adapted_for_the_lookup_is_refused(make, tmp_path, to):
    method = jaxpeft.LoRA(rank=4, targets=("embed_tokens", "q_proj"))
    made = make(method, "llama", CAUSAL, switches={"tie_word_embeddings": True})
    text = made.refused(tmp_path / "out", to=to)
    assert (
        "model.embed_tokens is adapted for the token lookup alone, but is also the head"
        " (tie_word_embeddings); use --to merged" in text
    )


@pytest.mark.parametrize("to", SERVERS)
def test_a_file_that_computes_something_else_is_an_error(make, tmp_path, monkeypatch, to):
    made = make(LORA, "llama", CAUSAL)
    real = server_files.with_updates

    def spoiled(updates, base):
        first, *rest = updates
        return real([first.__class__(**{**vars(first), "b": 1.1 * first.b}), *rest], base)

    monkeypatch.setattr(server_files, "with_updates", spoiled)
    text = made.refused(tmp_path / "out", ExportError, to)
    assert "out: the exported adapter, read again: logits differ by " in text
