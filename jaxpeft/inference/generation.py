"""Text generation: `generate`, and `complete`, which also returns log-probabilities and streams."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.inference.decoding import NO_TOKEN, State, programs
from jaxpeft.inference.sampling import Sampling
from jaxpeft.inputs import require_adapter, require_tree
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.logical_axes import mesh_under
from jaxpeft.sharding.sizes import row_shards

_CHECKED_EVERY = 16
"""Number of tokens after which the host looks for the end of texts, if it must."""
_log = logging.getLogger(__name__)
Ending = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Completion:
    """A generated text.

    Attributes:
        tokens: the new tokens, with the one that ended the text.
        log_probs: their log-probabilities under the model's distribution, before any temperature
            or filter.
        ending: why it ended: `end`, a token that ends texts; `stop`, the caller; `length`, the
            maximum number of tokens.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    ending: Ending


def generate(
    model: Pretrained,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos: int | Iterable[int] | None = None,
    adapter: Any | None = None,
    batch_size: int = 32,
) -> list[list[int]]:
    """Continue prompts with a language model.

    Args:
        model: a decoder from `load`, with task `causal_lm`.
        params: its parameters, with or without adapters, on one device or sharded over a mesh.
        prompts: the token ids of each prompt; prompts may differ in length.
        max_new_tokens: maximum number of new tokens of each text.
        temperature: divides the logits before sampling; 0 chooses the most likely token.
        top_k: sample from the k most likely tokens.
        top_p: sample from the most likely tokens whose probabilities sum to p.
        min_p: sample from the tokens with at least this share of the largest probability.
        repetition_penalty: makes tokens of the prompt and the text so far less likely if above 1.
        seed: seed of the samples. A text depends on the seed and the index of its prompt, not on
            the other prompts.
        eos: the tokens that end a text; None for those of the model's `generation_config.json` or
            `config.json`, an empty tuple for none.
        adapter: for an adapter stack (`jaxpeft.bank`), the index of the adapter, or one for each
            prompt.
        batch_size: maximum number of prompts that run together.

    Returns:
        The new tokens of each prompt, with the one that ended the text.

    Raises:
        ConfigError: An option is out of range, or the model is not a language model.
        DataError: A prompt is empty, or has a token outside the vocabulary.
    """
    completions = complete(
        model,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=Sampling(temperature, top_k, top_p, min_p, repetition_penalty),
        seed=seed,
        eos=eos,
        adapter=adapter,
        batch_size=batch_size,
    )
    return [list(each.tokens) for each in completions]


def complete(
    model: Pretrained,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    seed: int = 0,
    eos: int | Iterable[int] | None = None,
    adapter: Any | None = None,
    batch_size: int = 32,
    first: int = 0,
    stops: Callable[[Sequence[int]], bool] | None = None,
    stream: Callable[[int, Sequence[int]], None] | None = None,
) -> list[Completion]:
    """Continue prompts, like `generate`.

    Args:
        model: see `generate`.
        params: see `generate`.
        prompts: see `generate`.
        max_new_tokens: see `generate`.
        sampling: how tokens are chosen.
        seed: see `generate`.
        eos: see `generate`.
        adapter: see `generate`.
        batch_size: see `generate`.
        first: index of the first prompt, if the prompts are part of a longer list.
        stops: whether a text with these new tokens must end, called every few tokens.
        stream: called with the index of a prompt and its next tokens, as they are generated.

    Returns:
        The completion of each prompt.
    """
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens: must be at least 1, is {max_new_tokens}")
    if batch_size < 1:
        raise ConfigError(f"batch_size: must be at least 1, is {batch_size}")
    check_model(model, params)
    _check_prompts(model, prompts)
    adapters = _adapters(params, adapter, len(prompts))
    longest = max((len(prompt) for prompt in prompts), default=0) + max_new_tokens
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit and longest > limit:
        _log.warning(
            "prompt and completion have up to %d tokens, but the model was trained with positions"
            " up to %d",
            longest,
            limit,
        )
    mesh = mesh_under(params)
    run = _Run(
        dataclasses.replace(model.options, right_padded=True, remat="none"),
        model,
        params,
        mesh,
        sampling,
        max_new_tokens,
        jnp.asarray([*ends_of(model, eos)] or [NO_TOKEN], jnp.int32),
        stops,
        stream,
    )
    # rows of similar lengths need little padding
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = run.batch([prompts[i] for i in rows], rows, seed, first, adapters)
        found.update(zip(rows, batch, strict=True))
    return [found[i] for i in range(len(prompts))]


@dataclass(frozen=True)
class _Run:
    """The constants of a call of `complete`."""

    options: Any
    model: Pretrained
    params: Mapping[str, Any]
    mesh: Mesh | None
    sampling: Sampling
    most: int
    ends: jax.Array
    stops: Callable[[Sequence[int]], bool] | None
    stream: Callable[[int, Sequence[int]], None] | None

    def batch(
        self,
        prompts: Sequence[Sequence[int]],
        rows: Sequence[int],
        seed: int,
        first: int,
        adapters: np.ndarray[Any, Any] | None,
    ) -> list[Completion]:
        """Complete the prompts of one batch, which are those of `rows`."""
        over = 1 if self.mesh is None else row_shards(self.mesh.shape)
        count = -(-padded_size(len(prompts), 1) // over) * over
        ids = np.zeros((count, padded_size(max(map(len, prompts)), 16)), np.int32)
        sizes = np.ones(count, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)], sizes[i] = prompt, len(prompt)
        numbers = np.resize(np.asarray(rows, np.int64) + first, count)
        if adapters is not None and adapters.ndim:
            adapters = np.resize(adapters[np.asarray(rows)], count)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            jax.random.key(seed), jnp.asarray(numbers, jnp.uint32)
        )
        prefill, decode = programs(self.mesh)
        model: Any = self.model.clone(options=self.options, source=None)
        put = self._put
        adapter = None if adapters is None else put(adapters.astype(np.int32))
        state = prefill(
            model, self.sampling, self.most, self.params, put(ids), put(sizes), put(keys),
            put(self.ends), adapter
        )  # fmt: skip
        # rows that only fill the batch have ended
        filling = np.arange(count) >= len(prompts)
        shown = np.zeros(len(prompts), int)
        stopped = [False] * len(prompts)
        step = _CHECKED_EVERY if self.stops else 1 if self.stream else self.most
        while True:
            tokens, ended = np.asarray(state.tokens), np.asarray(state.ended)
            texts = [_text(row) for row in tokens[: len(prompts)]]
            if self.stops is not None:
                for i, text in enumerate(texts):
                    stopped[i] = stopped[i] or (not ended[i] and self.stops(text))
            if self.stream is not None:
                for i, text in enumerate(texts):
                    if not stopped[i] and len(text) > shown[i]:
                        self.stream(rows[i] + first, text[shown[i] :])
                        shown[i] = len(text)
            done = ended | filling
            done[: len(prompts)] |= stopped
            if done.all() or int(state.count) >= self.most:
                return self._completions(state, texts, stopped)
            state = dataclasses.replace(state, ended=put(done))
            until = min(int(state.count) + step, self.most)
            state = decode(model, self.sampling, self.params, state, jnp.asarray(until, jnp.int32))

    def _put(self, array: Any) -> jax.Array:
        if self.mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(self.mesh, PartitionSpec()))

    def _completions(
        self, state: State, texts: Sequence[Sequence[int]], stopped: Sequence[bool]
    ) -> list[Completion]:
        log_probs, ends = np.asarray(state.log_probs), set(np.asarray(self.ends).tolist())
        return [
            Completion(
                tuple(text),
                tuple(log_probs[i, : len(text)].tolist()),
                "end" if text[-1] in ends else "stop" if stopped[i] else "length",
            )
            for i, text in enumerate(texts)
        ]


def _text(row: np.ndarray[Any, Any]) -> list[int]:
    return row[row != NO_TOKEN].tolist()


def padded_size(count: int, least: int) -> int:
    """Return a count rounded up to one of few sizes, at most a quarter above it."""
    unit = max(least, 1 << max(0, math.ceil(math.log2(max(count, 1))) - 3))
    return -(-count // unit) * unit


def ends_of(model: Pretrained, eos: int | Iterable[int] | None) -> frozenset[int]:
    """Return the tokens that end a text.

    Args:
        model: the model.
        eos: see `generate`.

    Raises:
        ConfigError: `eos` is not a token id, or several.
    """
    if eos is None:
        return _recorded_ends(model)
    tokens: list[Any] = [eos] if isinstance(eos, int) else [*eos]
    if not all(np.issubdtype(np.asarray(token).dtype, np.integer) for token in tokens):
        raise ConfigError(f"eos: must be token ids, are {show(tokens)}")
    return frozenset(int(token) for token in tokens)


def _recorded_ends(model: Pretrained) -> frozenset[int]:
    """Return the tokens that end a text according to the model's files."""
    if model.source is None:
        return frozenset()
    for name in ("generation_config.json", "config.json"):
        file = model.source.folder / name
        found = read_json(file).get("eos_token_id") if file.is_file() else None
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def check_model(model: Any, params: Mapping[str, Any]) -> None:
    """Reject a model that cannot generate, or parameters that do not fit.

    Raises:
        ConfigError: It is not a language model from `load`, or a leaf does not fit.
    """
    if not isinstance(model, Pretrained) or model.options.task != "causal_lm":
        what = (
            f"a model with task {model.options.task!r}"
            if isinstance(model, Pretrained)
            else f"a {type(model).__name__}"
        )
        raise ConfigError(
            f"generate: needs a language model, jaxpeft.load(..., task='causal_lm'), got {what}"
        )
    require_tree(model, params)


def _check_prompts(model: Pretrained, prompts: Sequence[Sequence[int]]) -> None:
    vocab = model.config.vocab_size
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str) or not len(prompt):
            why = "is a text; tokenize it first" if isinstance(prompt, str) else "is empty"
            raise DataError(f"prompts[{i}]: {why}; a prompt is a list of token ids")
        ids = np.asarray(prompt)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise DataError(f"prompts[{i}]: must be a list of token ids, is {show(prompt)}")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= vocab:
            raise DataError(
                f"prompts[{i}]: {low if low < 0 else high} is outside the vocabulary of {vocab};"
                " check the tokenizer"
            )


def _adapters(
    params: Mapping[str, Any], adapter: Any | None, prompts: int
) -> np.ndarray[Any, Any] | None:
    """Return the adapter index of each prompt, or of all.

    Raises:
        DataError: There are not as many as prompts, or one is outside of the stack.
    """
    if adapter is None:
        return None
    require_adapter(params, adapter)
    found = np.asarray(adapter)
    if found.ndim and found.shape != (prompts,):
        raise DataError(
            f"adapter: has shape {list(found.shape)}, but there are {prompts} prompts; give one"
            " index, or one for each prompt"
        )
    return found
