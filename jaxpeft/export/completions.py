"""Log-probabilities from an OpenAI-compatible server.

Servers give log-probabilities of a prompt in different forms; they are tried in this order:

    prompt_logprobs   {"prompt": ids, "prompt_logprobs": 0}, of vLLM
    echo              {"prompt": ids, "echo": true, "logprobs": 1}, of OpenAI's first completions
    echo of text      the same with text, if the text has these ids (llama-cpp-python)
    next token        {"prompt": ids, "logprobs": 10}: those of the most likely next tokens, with
                      their ids (the server of llama.cpp)
    next token after text   {"prompt": text, "logprobs": true, "top_logprobs": 10} (MLX-LM)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxpeft.errors import ConfigError, ExportError, WeightsError, shorten
from jaxpeft.export.server_requests import ask, require_address
from jaxpeft.json_files import parse_json

_TOP = 10
_MOST_NAMES = 20
_LARGEST = 1e6
"""No log-probability of a model is as far from 0."""


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        ids: its tokens.
        text: a text that has these tokens; None if there is none.
    """

    ids: tuple[int, ...]
    text: str | None


@dataclass(frozen=True)
class Observation:
    """A log-probability that a server gave.

    Attributes:
        prompt: index of the prompt.
        position: index of the last token that the server had read.
        token: the next token.
        log_prob: its log-probability, natural.
    """

    prompt: int
    position: int
    token: int
    log_prob: float


@dataclass(frozen=True)
class Server:
    """A server.

    Attributes:
        url: its address, with or without `/v1`.
        model: name of the model to ask for.
        timeout: seconds to wait for a whole answer.
    """

    url: str
    model: str
    timeout: float

    def __post_init__(self) -> None:
        require_address(self.url)

    def observe(self, prompts: Sequence[Prompt]) -> tuple[str, list[Observation]]:
        """Return the form that the server understands, and its log-probabilities of prompts.

        Raises:
            ConfigError: The server has no such model.
            ExportError: It cannot be reached, fails, or gives no log-probabilities.
        """
        reasons: list[str] = []
        absent: list[str] = []
        for form in _FORMS:
            try:
                found = [
                    Observation(i, position, token, log_prob)
                    for i, prompt in enumerate(prompts)
                    for position, token, log_prob in form.observe(self._complete, prompt)
                ]
            except _NotFoundError as error:  # MLX-LM also answers a wrong type of prompt with it
                absent.append(f"{form.name}: {error}")
            except _UnknownFormError as error:
                reasons.append(f"{form.name}: {error}")
            else:
                return form.name, found
        if not reasons:
            self._require_model()
        why = "gives no usable log-probabilities of prompts; serve the model with vLLM or llama.cpp"
        raise ExportError([f"{self.url}: {why}", *reasons, *absent])

    def _require_model(self) -> None:
        """Raise an error of a server that answers every request with 404.

        Raises:
            ConfigError: It lists models, and not this one.
            ExportError: It does not say why.
        """
        names = self.models()
        if names and self.model not in names:
            more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
            raise ConfigError(
                f"--model: {self.url} has no model {self.model!r}; it has"
                f" {', '.join(map(shorten, names[:_MOST_NAMES]))}{more}"
            )
        raise ExportError(f"{self.url}: has no /v1/completions with model {self.model!r}")

    def models(self) -> list[str]:
        """Return the names of its models; empty if it does not tell."""
        try:
            found = self._call("models", None).get("data")
        except (_UnknownFormError, _NotFoundError, ExportError):
            return []
        rows = cast(list[Any], found) if isinstance(found, list) else []
        return [str(row["id"]) for row in rows if isinstance(row, dict) and "id" in row]

    def _complete(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the first choice of a completion of one token."""
        given = {"model": self.model, "max_tokens": 1, "temperature": 0, **body}
        choices = self._call("completions", given).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise _UnknownFormError("the answer has no choices")
        return cast(Mapping[str, Any], choices[0])

    def _call(self, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the JSON answer of a GET, or of a POST of a body."""
        url = f"{self.url.rstrip('/').removesuffix('/v1')}/v1/{path}"
        answer = ask(self.url, url, body, self.timeout)
        if answer.status >= 300:
            raise self._error(answer.status, answer.content[:10_000])
        try:
            return parse_json(answer.content, url)
        except WeightsError as error:
            raise ExportError(error.problems) from error

    def _error(self, code: int, text: bytes) -> Exception:
        """Return the error of an answer that is one."""
        said = shorten(" ".join(text.decode(errors="replace").split()), 200)
        if code == 404:
            return _NotFoundError(f"HTTP 404: {said}")
        if code in (400, 422, 501):
            return _UnknownFormError(f"HTTP {code}: {said}")
        return ExportError(f"{self.url}: answered with HTTP {code}: {said}")


class _UnknownFormError(Exception):
    """A server does not understand a form of requests."""


class _NotFoundError(Exception):
    """A server does not have a path or a model."""


# --------------------------------------------------------------------------------------- the forms

_Complete = Callable[[Mapping[str, Any]], Mapping[str, Any]]
_Rows = list[tuple[int, int, float]]
"""`(position, next token, log-probability)`."""


@dataclass(frozen=True)
class _Form:
    """A form of requests: its name, and the function that asks for one prompt."""

    name: str
    observe: Callable[[_Complete, Prompt], _Rows]


def _text(prompt: Prompt) -> str:
    if prompt.text is None:
        raise _UnknownFormError("the tokens of the prompts are no text of this tokenizer")
    return prompt.text


def _prompt_log_probs(complete: _Complete, prompt: Prompt) -> _Rows:
    found = complete({"prompt": prompt.ids, "prompt_logprobs": 0}).get("prompt_logprobs")
    if not isinstance(found, list) or len(cast(list[Any], found)) != len(prompt.ids):
        raise _UnknownFormError("the answer has no prompt_logprobs")
    rows = cast(list[Any], found)
    return [
        (i - 1, token, _number(_get(_get(rows[i], str(token)), "logprob")))
        for i, token in enumerate(prompt.ids)
        if i
    ]


def _echo(complete: _Complete, prompt: Prompt, *, text: bool = False) -> _Rows:
    given = _text(prompt) if text else prompt.ids
    choice = complete({"prompt": given, "echo": True, "logprobs": 1})
    found = _get(choice.get("logprobs"), "token_logprobs")
    # the prompt's tokens and the one that follows
    if not isinstance(found, list) or len(cast(list[Any], found)) - len(prompt.ids) not in (0, 1):
        raise _UnknownFormError("the answer has no logprobs.token_logprobs of the prompt")
    rows = cast(list[Any], found)
    return [(i - 1, token, _number(rows[i])) for i, token in enumerate(prompt.ids) if i]


def _next_token(complete: _Complete, prompt: Prompt) -> _Rows:
    """Return the likely next tokens after half of the prompt and after all of it."""
    lengths = sorted({(len(prompt.ids) + 1) // 2, len(prompt.ids)})
    return [
        row
        for length in lengths
        for row in _top(complete({"prompt": prompt.ids[:length], "logprobs": _TOP}), length)
    ]


def _next_token_of_text(complete: _Complete, prompt: Prompt) -> _Rows:
    body = {"prompt": _text(prompt), "logprobs": True, "top_logprobs": _TOP}
    return _top(complete(body), len(prompt.ids))


def _top(choice: Mapping[str, Any], length: int) -> _Rows:
    content = _get(choice.get("logprobs"), "content")
    if not isinstance(content, list) or not content:
        raise _UnknownFormError("the answer has no logprobs.content")
    found = _get(content[0], "top_logprobs")
    rows = cast(list[Any], found) if isinstance(found, list) else []
    if not rows:
        raise _UnknownFormError("the answer has no logprobs.content.top_logprobs")
    return [(length - 1, _id(_get(row, "id")), _number(_get(row, "logprob"))) for row in rows]


def _get(value: Any, key: str) -> Any:
    """Return an entry of an answer; None if it is not there."""
    return cast(Mapping[str, Any], value).get(key) if isinstance(value, Mapping) else None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _UnknownFormError("the answer has no log-probability for every token")
    if math.isnan(value) or abs(value) > _LARGEST:
        raise _UnknownFormError(f"the answer has {float(value):g} as a log-probability")
    return float(value)


def _id(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _UnknownFormError("the answer has no id, a whole number, for every token")
    return value


_FORMS = (
    _Form("prompt_logprobs", _prompt_log_probs),
    _Form("echo", _echo),
    _Form("echo of text", lambda complete, prompt: _echo(complete, prompt, text=True)),
    _Form("next token", _next_token),
    _Form("next token after text", _next_token_of_text),
)
