"""The client of OpenAI-compatible servers: forms of requests, and errors."""

from __future__ import annotations

import socket
import time

import numpy as np
import pytest

from jaxpeft.errors import ConfigError, ExportError
from jaxpeft.export.completions import Observation, Prompt, Server
from tests.export.serving import Served, serve

VOCAB = 12
PROMPTS = (Prompt((1, 5, 7, 2), "a b c d"), Prompt((3, 4), "e f"))
WORDS = {prompt.text: list(prompt.ids) for prompt in PROMPTS}


def compute(ids):
    """Log-probabilities that depend on the prefix."""
    rows = [np.sin((1 + sum(ids[: i + 1])) * np.arange(1, VOCAB + 1)) for i in range(len(ids))]
    return np.array([row - np.log(np.exp(row).sum()) for row in rows])


def tokenizer(text):
    return {"input_ids": WORDS[text]}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def observe(served, model="tuned", timeout=30.0, prompts=PROMPTS):
    with serve(served) as url:
        return Server(url, model, timeout).observe(prompts)


@pytest.mark.parametrize(
    ("form", "wanted"),
    [("vllm", "prompt_logprobs"), ("echo", "echo"), ("echo of text", "echo of text")],
)
def test_log_probabilities_of_prompts(form, wanted):
    name, found = observe(Served(compute, form, tokenizer))
    assert name == wanted
    assert found == [
        Observation(
            p, i - 1, prompt.ids[i], pytest.approx(compute(prompt.ids)[i - 1, prompt.ids[i]])
        )
        for p, prompt in enumerate(PROMPTS)
        for i in range(1, len(prompt.ids))
    ]


@pytest.mark.parametrize(
    ("form", "wanted", "lengths"),
    [
        ("llama.cpp", "next token", ((2, 4), (1, 2))),
        ("mlx", "next token after text", ((4,), (2,))),
    ],
)
def test_log_probabilities_of_the_likely_next_tokens(form, wanted, lengths):
    name, found = observe(Served(compute, form, tokenizer))
    assert name == wanted
    places = [(p, n - 1) for p, own in enumerate(lengths) for n in own]
    assert [(one.prompt, one.position) for one in found] == [p for p in places for _ in range(10)]
    for one in found:
        own = compute(PROMPTS[one.prompt].ids[: one.position + 1])[-1]
        assert one.log_prob == pytest.approx(own[one.token])
        assert one.token in np.argsort(-own)[:10]


def test_a_request_is_of_one_token_of_the_model_without_sampling():
    served = Served(compute)
    observe(served)
    assert served.requests == [
        {
            "model": "tuned",
            "max_tokens": 1,
            "temperature": 0,
            "prompt": list(prompt.ids),
            "prompt_logprobs": 0,
        }
        for prompt in PROMPTS
    ]


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_the_address_may_end_in_v1(end):
    with serve(Served(compute)) as url:
        assert Server(url + end, "tuned", 30.0).observe(PROMPTS)[0] == "prompt_logprobs"


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "file:///etc/passwd", "http://"])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--verify: must be the address of a server, such as"):
        Server(url, "m", 1.0)


def test_a_model_that_the_server_does_not_have_is_named_with_those_that_it_has():
    with pytest.raises(ConfigError, match="has no model 'other'; it has tuned, base"):
        observe(Served(compute), model="other")


@pytest.mark.parametrize("models", [{"data": [{"id": "tuned"}]}, {"data": 3}, b"<html>"])
def test_a_server_without_completions_is_named(models):
    def answer(path, body):
        return (404, b"not here") if body else (200, models)

    with pytest.raises(ExportError, match=r"has no /v1/completions with model 'tuned'"):
        observe(Served(compute, answer=answer))


def test_no_connection_is_an_error():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(ExportError, match=r"cannot be reached \(.*refused.*\); is the server run"):
        Server(url, "m", 5.0).observe(PROMPTS)


def test_a_server_that_does_not_answer_is_an_error():
    def answer(path, body):
        time.sleep(0.5)
        return 200, {}

    with pytest.raises(ExportError, match=r"cannot be reached \(.*timed out"):
        observe(Served(compute, answer=answer), timeout=0.1)


def test_a_failure_of_the_server_is_shown():
    with pytest.raises(ExportError, match="answered with HTTP 500: the engine is dead"):
        observe(Served(compute, answer=lambda path, body: (500, b"the engine\nis dead")))


def test_an_answer_that_is_no_json_is_an_error():
    with pytest.raises(ExportError, match="v1/completions:1:1: not JSON"):
        observe(Served(compute, answer=lambda path, body: (200, b"<html>")))


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (
            (200, {"choices": [{"text": "x", "logprobs": None}]}),
            "the answer has no prompt_logprobs",
        ),
        ((200, {"choices": []}), "prompt_logprobs: the answer has no choices"),
        ((400, {"error": "unknown field"}), "echo of text: HTTP 400: .*unknown field"),
        (
            (200, {"choices": [{"prompt_logprobs": [None, {}, {}, {}]}]}),
            "no log-probability or id for every token",
        ),
        (
            (200, {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"logprob": -1}]}]}}]}),
            "next token: the answer has no log-probability or id",
        ),
    ],
)
def test_a_server_without_log_probabilities_is_an_error_with_all_that_was_tried(answer, why):
    with pytest.raises(ExportError, match=why) as caught:
        observe(Served(compute, answer=lambda path, body: answer))
    first, *tried = caught.value.problems
    assert first.endswith(
        "gives no log-probabilities of prompts; serve the model with vLLM or llama.cpp"
    )
    assert [text.partition(":")[0] for text in tried] == [
        "prompt_logprobs",
        "echo",
        "echo of text",
        "next token",
        "next token after text",
    ]


def test_prompts_without_a_text_are_not_sent_as_one():
    prompts = (Prompt((1, 5), None),)
    with pytest.raises(ExportError, match="echo of text: the tokens of the prompts are no text"):
        observe(Served(compute, "mlx", tokenizer), prompts=prompts)
