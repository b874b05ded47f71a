"""Forgetting on general text: the change in loss, and how far the answers have moved."""

from __future__ import annotations

import numpy as np
import pytest

import jaxpeft
from jaxpeft.inference.adapted_model import load_adapted
from tests.train.runs import write_rows


@pytest.mark.slow
def test_forgetting_is_the_change_in_loss_and_in_the_next_token(trained, evaluate, tmp_path):
    run = trained("answers")
    general = write_rows(tmp_path / "general.jsonl", "text", 12)
    found, shown = evaluate(
        "--adapter", run.folder, "--data", run.rows, "--general", general, "--general-prompts=5",
        "--max-new-tokens=6",
    )  # fmt: skip
    forgotten = found["forgetting"]
    assert forgotten["rows"] == 12
    loss = forgotten["metrics"]["loss"]
    assert loss["difference"]["value"] == pytest.approx(loss["value"] - loss["against"]["value"])

    # by hand, in one batch
    loaded = load_adapted(None, run.folder)
    texts = [line.split('"')[3] for line in general.read_text().splitlines()]
    batch = loaded.tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    p, q = (
        _log_softmax(np.asarray(jaxpeft.apply(loaded.model, params, ids, mask))[:, :-1])
        for params in (loaded.base, loaded.params)
    )
    inside = mask[:, 1:] == 1
    apart = (np.exp(p) * (p - q)).sum(-1)[inside]
    losses = -np.take_along_axis(q, ids[:, 1:, None], -1)[..., 0][inside]
    assert forgotten["kl"]["value"] == pytest.approx(np.mean(apart), rel=1e-4)
    assert loss["value"] == pytest.approx(np.mean(losses), rel=1e-5)

    answers = forgotten["answers"]
    assert len(answers) == 5
    share = np.mean([one["answer"] != one["base"] for one in answers])
    assert forgotten["changed_answers"]["value"] == pytest.approx(share)
    assert "share of 5 greedy answers that changed" in shown


def _log_softmax(logits):
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.slow
def test_without_prompts_no_answers_are_generated(trained, evaluate, tmp_path):
    run = trained("answers")
    general = write_rows(tmp_path / "general.jsonl", "text", 4)
    found, _ = evaluate(
        "--adapter", run.folder, "--data", run.rows, "--general", general, "--general-prompts=0"
    )
    assert found["forgetting"]["changed_answers"] is None
