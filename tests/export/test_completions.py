"""The client of OpenAI-compatible servers: forms of requests, and errors."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager, suppress

import numpy as np
import pytest

from jaxpeft.errors import ConfigError, ExportError
from jaxpeft.export import server_requests
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


BAD_ADDRESSES = (
    "http://",
    "http://[::1",
    "http://a b",
    "http://127.0.0.1:abc",
    "http://h:99999",
    "http://h/?model=x",
    "http://h\x1b[31m",
)


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://host", "file:///etc/passwd", *BAD_ADDRESSES]
)
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ConfigError, match="--verify: must be the address of a server, such as"):
        Server(url, "m", 1.0)


@pytest.mark.parametrize(
    "url", ["http://user:secret@host", "user:secret@h", "http://u:secret@[::1"]
)
def test_a_password_is_refused_and_not_shown(url):
    with pytest.raises(
        ConfigError, match=r"must have no user and no password, is \*\*\*@"
    ) as caught:
        Server(url, "m", 1.0)
    assert "secret" not in str(caught.value)


def test_texts_of_the_server_cannot_control_the_terminal():
    names = {"data": [{"id": f"\x1b[2J{i}"} for i in range(30)]}

    def answer(path, body):
        return (404, b"\x1b]0;title\x07") if body else (200, names)

    with pytest.raises(ConfigError, match=r"it has '\\x1b\[2J0', .* and 10 more") as caught:
        observe(Served(compute, answer=answer))
    assert "\x1b" not in str(caught.value)
    with pytest.raises(ExportError, match=r"HTTP 500: '\\x1b\[31m'"):
        observe(Served(compute, answer=lambda path, body: (500, b"\x1b[31m")))


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "-1e300", "1" + "0" * 250])
def test_numbers_that_are_no_log_probabilities_are_refused(value):
    content = f'{{"choices": [{{"prompt_logprobs": [null, {{"4": {{"logprob": {value}}}}}]}}]}}'
    with pytest.raises(
        ExportError, match=r"prompt_logprobs: the answer has .* as a log-probability"
    ):
        observe(Served(compute, answer=lambda *_: (200, content.encode())), prompts=PROMPTS[1:])


@pytest.mark.parametrize("value", ["-1", "1.7", "true", "NaN", '"5"'])
def test_ids_that_are_none_are_refused(value):
    row = f'{{"content": [{{"top_logprobs": [{{"id": {value}, "logprob": -1}}]}}]}}'
    content = f'{{"choices": [{{"logprobs": {row}}}]}}'.encode()
    with pytest.raises(ExportError, match="next token: the answer has no id, a whole number"):
        observe(Served(compute, answer=lambda *_: (200, content)))


@contextmanager
def speak(parts, pause=0.0):
    """Run a server that sends parts of bytes, whatever it is asked; yield its address."""

    def run():
        connection = server.accept()[0]
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            for part in parts:
                connection.sendall(part)
                time.sleep(pause)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):  # closing with unread bytes would reset it
                pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=run)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        thread.join()


OK = b"HTTP/1.1 200 OK\r\n"


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([b"SSH-2.0-OpenSSH\r\n"], r"no valid HTTP answer \(BadStatusLine: 'SSH-2.0"),
        ([b"HTTP/1.1 200 \x1b[31m\r\n\r\nx"], "not JSON"),
        ([OK + b"A: " + b"a" * 70_000], r"no valid HTTP answer \(LineTooLong"),
        ([OK + b"A: b\r\n" * 200 + b"\r\n"], r"no valid HTTP answer \(HTTPException"),
        ([OK + b"Content-Length: 10\r\n\r\nabc"], "not JSON"),
        ([OK + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"], "no valid HTTP answer"),
        (
            [b"HTTP/1.1 400 No\r\nTransfer-Encoding: chunked\r\n\r\nff\r\nabc"],
            r"no valid HTTP answer \(IncompleteRead",
        ),
        ([], r"cannot be reached \("),
    ],
)
def test_an_answer_that_is_no_http_is_an_error(parts, why):
    with speak(parts) as url, pytest.raises(ExportError, match=why) as caught:
        Server(url, "m", 5.0).observe(PROMPTS)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    "head", [b"", OK, OK + b"Content-Length: 20\r\n\r\n", b"HTTP/1.1 400 No\r\n\r\n"]
)
@pytest.mark.representatives("*Content-Length*")
def test_a_slow_answer_is_bounded_as_a_whole(head):
    began = time.monotonic()
    with speak([head, *[b"a"] * 12], pause=0.1) as url:
        with pytest.raises(ExportError, match=r"gives no whole answer in 0\.5 s"):
            Server(url, "m", 0.5).observe(PROMPTS)
        assert time.monotonic() - began < 1.0


def test_an_answer_is_bounded_in_size(monkeypatch):
    monkeypatch.setattr(server_requests, "_MOST_BYTES", 1000)
    with pytest.raises(ExportError, match="answered with more than 1,000 bytes"):
        observe(Served(compute, answer=lambda path, body: (200, b" " * 1001)))


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

    with pytest.raises(
        ExportError, match=r"gives no whole answer in 0.1 s; is it busy\? Set --timeout"
    ):
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
            "no log-probability for every token",
        ),
        (
            (200, {"choices": [{"logprobs": {"content": [{"top_logprobs": [{"logprob": -1}]}]}}]}),
            "next token: the answer has no id, a whole number, for every token",
        ),
    ],
)
def test_a_server_without_log_probabilities_is_an_error_with_all_that_was_tried(answer, why):
    with pytest.raises(ExportError, match=why) as caught:
        observe(Served(compute, answer=lambda path, body: answer))
    first, *tried = caught.value.problems
    assert first.endswith(
        "gives no usable log-probabilities of prompts; serve the model with vLLM or llama.cpp"
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
