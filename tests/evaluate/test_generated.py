"""Scores of generated answers, and code whose tests run."""

from __future__ import annotations

import json

import pytest

from jaxpeft.evaluate import generated
from jaxpeft.evaluate.generated import Answer, Generating, generate_answers
from jaxpeft.inference.adapted_model import load_adapted
from tests.train.runs import WORDS


def test_answers_are_those_of_transformers(tiny_models):
    import torch
    from transformers import AutoModelForCausalLM

    loaded = load_adapted(str(tiny_models["llama"]))
    prompts = [[2, 10, 11], [2, 12, 13, 14, 15]]
    answers = generate_answers(loaded, loaded.params, prompts, Generating(max_new_tokens=5))
    theirs = AutoModelForCausalLM.from_pretrained(tiny_models["llama"], dtype=torch.float32)
    for prompt, answer in zip(prompts, answers, strict=True):
        out = theirs.generate(
            torch.tensor([prompt]),
            max_new_tokens=5,
            do_sample=False,
            eos_token_id=3,
            pad_token_id=0,
        )
        assert answer.text == loaded.tokenizer.decode(
            out[0, len(prompt) :], skip_special_tokens=True
        )


@pytest.mark.skipif("sys.platform != 'linux'", reason="Linux limits the process")
def test_the_tests_of_each_row_run_with_its_answer(trained, evaluate, monkeypatch, tmp_path):
    run = trained("answers")
    rows = [
        {"prompt": WORDS[5], "completion": WORDS[6], "test_list": [f"assert x == {i}"]}
        for i in range(3)
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    answers = ["x = 0", "```python\nx = 1\n```", "x = 7"]
    monkeypatch.setattr(
        generated,
        "generate_answers",
        lambda *_: [Answer(text, text == "x = 7") for text in answers],
    )
    found, shown = evaluate(
        "--adapter",
        run.folder,
        "--data",
        data,
        "--run-code=answer",
        "--separator= ",
        "--format=prompt_completion",
    )
    assert found["metrics"]["code_passes"]["value"] == pytest.approx(2 / 3)
    assert [row["scores"]["code_passes"] for row in found["rows"]] == [1, 1, 0]
    assert [row["prediction"] for row in found["rows"]] == answers
    assert [row["cut"] for row in found["rows"]] == [False, False, True]
    assert "model: x = 7…" in shown and "model: x = 0\n" in shown
    assert "code_passes" in shown


@pytest.mark.skipif("sys.platform != 'linux'", reason="Linux limits the process")
def test_rows_without_tests_are_refused_before_anything_is_generated(
    trained, evaluate, tmp_path, monkeypatch
):
    run = trained("answers")
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps({"prompt": "word1", "completion": "word2"}) + "\n")
    monkeypatch.setattr(generated, "generate_answers", lambda *_: pytest.fail("generates"))
    error = evaluate(
        "--adapter",
        run.folder,
        "--data",
        data,
        "--run-code=answer",
        "--separator= ",
        "--format=prompt_completion",
        fails=True,
    )
    assert "--run-code: a row has no tests in column" in error
