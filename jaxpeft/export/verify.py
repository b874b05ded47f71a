"""Verify that a server serves an adapter: `python -m jaxpeft.export --verify URL --model NAME`.

The server's log-probabilities of a few texts are compared with those of the adapter and with those
of its base. With `d` the mean absolute difference over the same tokens, in nats:

* the server serves the nearer of the two if its `d` is at most a third of the distance between
  them, so that the other is at least twice as far away, and at most `TOLERANCE`;
* if adapter and base are closer to each other than three times `NOISE`, and the server is as close
  as rounding allows, they cannot be told apart, which is an error;
* it serves something else otherwise.

Servers in bfloat16 differ from float32 by about 0.01, 8-bit weights by a few hundredths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxpeft.errors import ConfigError, DataError, ExportError, show
from jaxpeft.export.completions import Observation, Prompt, Server
from jaxpeft.export.probe import log_probs_of
from jaxpeft.export.request import VerifyRequest, outline_of
from jaxpeft.hub.adapters.adapter_folder import read_adapter
from jaxpeft.hub.adapters.load import load_adapter
from jaxpeft.inference.adapted_model import AdaptedModel

TOLERANCE = 0.1
"""The largest mean difference in nats at which a server computes the same."""
NOISE = 0.02
"""The mean difference in nats that rounding to 16 bits may cause."""
MARGIN = 3.0
TEXTS = (
    "The committee met on Tuesday to discuss the budget for the next year.",
    "Question: What is the capital of France? Answer: The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))",
    "Once upon a time, there was a little girl who lived near the forest with her mother.",
    "SELECT name, price FROM products WHERE price > 10 ORDER BY price DESC;",
    "Dear Sir or Madam, I am writing to complain about the delivery of my order.",
    "A train travels 60 miles in 2 hours. How far does it travel in 5 hours?",
    "Translate to German: Good morning, how are you today?",
)
_State = Literal["the adapter", "the base", "something else"]


@dataclass(frozen=True)
class Verdict:
    """What a server serves.

    Attributes:
        state: what it serves.
        to_adapter: mean absolute difference from the adapter's log-probabilities.
        to_base: the same from the base's.
        apart: the same between adapter and base.
        tokens: number of log-probabilities.
        form: form of the requests that the server understood.
    """

    state: _State
    to_adapter: float
    to_base: float
    apart: float
    tokens: int
    form: str

    @property
    def serves_adapter(self) -> bool:
        """Whether it serves the adapter."""
        return self.state == "the adapter"

    @property
    def lines(self) -> tuple[str, ...]:
        """The text for the terminal."""
        return (
            f"serves {self.state}",
            (
                f"mean difference of log-probabilities: {self.to_adapter:.2g} from the adapter,"
                f" {self.to_base:.2g} from the base; adapter and base differ by {self.apart:.2g}"
                f" ({self.tokens} log-probabilities, from {self.form})"
            ),
        )


def verify(request: VerifyRequest, server: Server) -> Verdict:
    """Ask a server for log-probabilities, and say what it serves.

    Args:
        request: the adapter and its base.
        server: the server.

    Raises:
        ConfigError: The server has no such model, or the adapter is no language model's.
        AdapterError: The adapter is invalid, or belongs to another base.
        ExportError: The server cannot be reached, gives no log-probabilities or those of another
            vocabulary, or adapter and base cannot be told apart.
    """
    adapter = read_adapter(request.adapter)
    outline = outline_of(request, adapter)
    if outline.model.options.task != "causal_lm":
        raise ConfigError(
            f"--verify: {request.adapter} was trained for {outline.model.options.task}, but only"
            " language models have log-probabilities to compare"
        )
    model, base = outline.model, outline.read(log_head=False)
    method, params = load_adapter(adapter.folder, model, base, allow_base=request.allow_base)
    prompts = _prompts(
        AdaptedModel(model, base, params, adapter.settings, method, request.adapter), TEXTS
    )
    form, found = server.observe(prompts)
    _require_tokens(found, model.config.vocab_size)
    ids = [prompt.ids for prompt in prompts]
    ours = _taken(log_probs_of(model, params, ids), found)
    plain = _taken(log_probs_of(model, base, ids), found)
    theirs = np.array([one.log_prob for one in found])
    return decide(theirs, ours, plain, form)


def decide(theirs: Any, ours: Any, plain: Any, form: str) -> Verdict:
    """Return what a server serves.

    Args:
        theirs: the server's log-probabilities, `[tokens]`.
        ours: those of the adapter.
        plain: those of its base.
        form: form of the requests.

    Raises:
        ExportError: Adapter and base cannot be told apart, or give NaN.
    """
    if not (np.isfinite(ours).all() and np.isfinite(plain).all()):
        which = "the base" if not np.isfinite(plain).all() else "the adapter"
        raise ExportError(f"{which} itself gives log-probabilities that are not finite")
    to_adapter, to_base, apart = (
        float(np.abs(a - b).mean()) for a, b in ((theirs, ours), (theirs, plain), (ours, plain))
    )
    near = min(to_adapter, to_base)
    state: _State = "something else"
    if near <= min(TOLERANCE, apart / MARGIN):
        state = "the adapter" if to_adapter <= to_base else "the base"
    elif apart < MARGIN * NOISE and near <= NOISE:
        raise ExportError(
            f"the adapter changes the log-probabilities of the probe texts by {apart:.2g} on"
            f" average, and the server differs from both by {near:.2g} or more, as rounding does:"
            " whether it serves the adapter or the base cannot be told"
        )
    return Verdict(state, to_adapter, to_base, apart, len(theirs), form)


def _prompts(loaded: AdaptedModel, texts: Sequence[str]) -> list[Prompt]:
    """Return the tokens of the probe texts.

    Raises:
        DataError: There is no tokenizer, or it gives tokens that the model does not have.
    """
    tokenizer, most = loaded.tokenizer, loaded.model.config.max_position_embeddings
    prompts: list[Prompt] = []
    for text in texts:
        ids = tuple(int(token) for token in tokenizer(text)["input_ids"])
        if len(ids) < 2:
            continue
        whole = len(ids) <= most - 1  # the server adds a token
        ids = ids[: most - 1]
        if max(ids) >= loaded.model.config.vocab_size:
            raise DataError(
                f"the tokenizer gives token {max(ids)}, but the model has"
                f" {loaded.model.config.vocab_size} tokens; use the base's own tokenizer"
            )
        prompts.append(Prompt(ids, text if whole else None))
    if not prompts:
        raise DataError("the tokenizer gives fewer than two tokens for each probe text")
    return prompts


def _require_tokens(found: Sequence[Observation], size: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ExportError: The server gives such a token.
    """
    largest = max(one.token for one in found)
    if largest >= size:
        raise ExportError(
            f"the server gives token {show(largest)}, but the adapter's model has {size} tokens: it"
            " serves another model"
        )


def _taken(log_probs: Any, found: Sequence[Observation]) -> Any:
    """Return our log-probabilities of what a server gave, `[tokens]`."""
    return np.array([log_probs[one.prompt, one.position, one.token] for one in found])
