"""lm-eval on jaxpeft: the log-likelihoods and texts of its own `hf` model, offline."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxpeft.errors import ConfigError, DataError
from tests.train.runs import WORDS, tiny_models

__all__ = ["tiny_models"]
lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (make test-all does)")
# lm-eval and its dependencies warn of their own code
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
TASKS = Path(__file__).parent / "lm_eval_tasks"
NAMES = ["colors_choice", "colors_text", "colors_answer"]


@pytest.fixture(scope="module")
def models(tiny_models: Mapping[str, Path]) -> tuple[Any, Any]:
    """The model `hf`, and ours."""
    from lm_eval.models.huggingface import HFLM

    from jaxpeft.evaluation.lm_eval import JaxPeft

    folder = str(tiny_models["llama"])
    return HFLM(pretrained=folder, device="cpu", dtype="float32", batch_size=2), JaxPeft(folder)


def requests(*arguments: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def texts(count: int, longest: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, rng.integers(1, longest))) for _ in range(count)]


def test_log_likelihoods_are_those_of_hf(models: tuple[Any, Any]) -> None:
    pairs = [(a, f" {b}") for a, b in zip(["", *texts(6, 20)], texts(7, 8), strict=True)]
    pairs.append((" ".join(WORDS[:58]), " ".join(["", *WORDS[:12]])))  # longer than the model
    theirs, ours = (model.loglikelihood(requests(*pairs)) for model in models)
    np.testing.assert_allclose([x for x, _ in ours], [x for x, _ in theirs], atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_rolling_log_likelihoods_are_those_of_hf(models: tuple[Any, Any]) -> None:
    given = [(text,) for text in [*texts(4, 20), " ".join(texts(12, 20))]]  # the last in windows
    theirs, ours = (model.loglikelihood_rolling(requests(*given)) for model in models)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)


def test_texts_are_those_of_hf(models: tuple[Any, Any]) -> None:
    # hf pads a batch on the left: one text at a time is the same for both
    options = {"until": ["word7"], "max_gen_toks": 9, "do_sample": False}
    for text in texts(5, 12):
        theirs, ours = (model.generate_until(requests((text, options))) for model in models)
        assert ours == theirs
    given = [(text, options) for text in texts(5, 12)]
    ours = models[1].generate_until(requests(*given))
    assert ours == [models[1].generate_until(requests(each))[0] for each in given]
    with pytest.raises(ConfigError, match="generation_kwargs: num_beams is not supported"):
        models[1].generate_until(requests(("word1", {"num_beams": 3})))
    with pytest.raises(ConfigError, match="max_gen_toks: 64 leaves no room"):
        models[1].generate_until(requests(("word1", {"max_gen_toks": 64})))


@pytest.mark.parametrize(
    "more",
    [
        {"until": None},
        {"until": [""]},
        {"until": ["", "word7"]},
        {"until": ["word7"]},
        {"num_beams": 1},
    ],
    ids=str,
)
def test_options_that_change_nothing_are_those_of_hf(
    models: tuple[Any, Any], more: dict[str, Any]
) -> None:
    options = {"until": [], "max_gen_toks": 9, "do_sample": False} | more
    for text in texts(3, 12):
        until = options["until"]  # hf fails at null, and stops after a token at an empty text
        for_hf = options | {"until": [one for one in until or [] if one]}
        theirs = models[0].generate_until(requests((text, for_hf)))
        assert models[1].generate_until(requests((text, options))) == theirs


def test_max_length_is_ignored_with_a_warning(
    models: tuple[Any, Any], caplog: pytest.LogCaptureFixture
) -> None:
    options = {"until": [], "max_gen_toks": 5}
    given = requests(("word1", options | {"max_length": 3}))
    found = models[1].generate_until(given)
    assert "max_length is ignored; set max_gen_toks instead" in caplog.text
    assert found == models[1].generate_until(requests(("word1", options)))


def test_stop_texts_that_are_none_are_refused(models: tuple[Any, Any]) -> None:
    with pytest.raises(ConfigError, match="generation_kwargs: until must be texts, has 3"):
        models[1].generate_until(requests(("word1", {"until": ["a", 3]})))


@pytest.mark.parametrize("count", [0, 65])
def test_continuations_that_hf_does_not_score_are_refused(
    models: tuple[Any, Any], count: int
) -> None:
    request = (("word1", "x"), [5], [6] * count)
    assert models[1].max_length == models[0].max_length == 64
    with pytest.raises(DataError, match=f"continuation of {count} tokens, but 1 to 64"):
        models[1]._loglikelihood_tokens([request])
    with pytest.raises(AssertionError):
        models[0]._loglikelihood_tokens([request])
    longest = (("word1", "x"), [5], [6] * 64)
    ours, theirs = (model._loglikelihood_tokens([longest])[0][0] for model in models)
    assert ours == pytest.approx(theirs, abs=1e-3)


def test_three_tasks_run_from_local_files(
    tiny_models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jaxpeft.evaluation.lm_eval import main

    for file in TASKS.glob("*.yaml"):
        shutil.copy(file, tmp_path)
    rows = [
        {"question": text, "choices": [f"{WORDS[i]}", f"{WORDS[i + 1]}", "word9"], "answer": i % 3}
        for i, text in enumerate(texts(9, 12))
    ]
    (tmp_path / "colors.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    folder = tiny_models["llama"]
    results: dict[str, Any] = {}
    for name, given in (
        ("hf", f"pretrained={folder},dtype=float32"),
        ("jaxpeft", f"base={folder}"),
    ):
        argv = ["--model", name, "--model_args", given, "--tasks", ",".join(NAMES)]
        argv += ["--include_path", str(tmp_path), "--output_path", str(tmp_path / name)]
        argv += ["--device", "cpu", "--batch_size", "1"]
        main(argv)
        (found,) = (tmp_path / name).rglob("results_*.json")
        results[name] = json.loads(found.read_text())["results"]
    for task in NAMES:
        for metric, value in results["hf"][task].items():
            if isinstance(value, float):
                assert results["jaxpeft"][task][metric] == pytest.approx(value, rel=1e-4), metric
    assert {"acc,none", "acc_norm,none"} <= set(results["jaxpeft"]["colors_choice"])
