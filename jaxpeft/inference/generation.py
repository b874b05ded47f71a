"""Text generation: `generate`, and `complete`, which also returns log-probabilities and streams."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft.errors import ConfigError, DataError, show
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.inference.decoding import NO_TOKEN, State, programs
from jaxpeft.inference.sampling import Sampling, number
from jaxpeft.inputs import require_adapter, require_tree
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.processes.arrays import replicate
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
        ConfigError: An option is out of range, the model is not a language model, or the call is
            traced, as inside of `jax.jit`.
        DataError: A prompt is empty, or has a token outside the vocabulary.
    """
    _require_untraced((params, prompts, temperature, top_p, min_p, seed, adapter))
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
    max_new_tokens = _integer("max_new_tokens", max_new_tokens, 1)
    batch_size, seed = _integer("batch_size", batch_size, 1), _integer("seed", seed, 0, 2**63 - 1)
    check_model(model, params)
    checked = _check_prompts(model, prompts)
    adapters = _adapters(params, adapter, len(checked))
    longest = max((len(prompt) for prompt in checked), default=0) + max_new_tokens
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
        np.asarray(sorted(ends_of(model, eos)) or [NO_TOKEN], np.int32),
        stops,
        stream,
    )
    # rows of similar lengths need little padding
    order = sorted(range(len(checked)), key=lambda i: -len(checked[i]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = run.batch([checked[i] for i in rows], rows, seed, first, adapters)
        found.update(zip(rows, batch, strict=True))
    return [found[i] for i in range(len(checked))]


def _require_untraced(arguments: Any) -> None:
    """Raise an error inside of `jax.jit`, `jax.vmap` and the like.

    Raises:
        ConfigError: An argument is traced, or a new array would be.
    """
    leaves = [*jax.tree.leaves(arguments), jnp.zeros(())]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise ConfigError(
            "generate: cannot be traced by jax.jit, jax.vmap or another transformation, since the"
            " host decides when a text ends; call it outside of them: it compiles its own programs,"
            " and takes many prompts at once"
        )


@dataclass(frozen=True)
class _Run:
    """The constants of a call of `complete`."""

    options: Any
    model: Pretrained
    params: Mapping[str, Any]
    mesh: Mesh | None
    sampling: Sampling
    most: int
    ends: np.ndarray[Any, Any]
    stops: Callable[[Sequence[int]], bool] | None
    stream: Callable[[int, Sequence[int]], None] | None

    def batch(
        self,
        prompts: Sequence[np.ndarray[Any, Any]],
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
        keys = jax.random.key_data(
            jax.vmap(jax.random.fold_in, (None, 0))(
                jax.random.key(seed), jnp.asarray(numbers, jnp.uint32)
            )
        )
        prefill, decode = programs(self.mesh)
        model: Any = self.model.clone(options=self.options, source=None)
        put = partial(replicate, self.mesh)
        adapter = None if adapters is None else put(adapters.astype(np.int32))
        rule, numbers = self.sampling.rule, jax.tree.map(put, self.sampling.numbers)
        room = padded_size(self.most, _CHECKED_EVERY)
        state = prefill(
            model, rule, room, self.params, put(ids), put(sizes), put(keys), put(self.ends),
            adapter, numbers,
        )  # fmt: skip
        # rows that only fill the batch have ended
        filling = np.arange(count) >= len(prompts)
        texts = [_Text() for _ in prompts]
        step = _CHECKED_EVERY if self.stops else 1 if self.stream else self.most
        while True:
            tokens, ended = np.asarray(state.tokens), np.asarray(state.ended)
            done = ended | filling
            for i, text in enumerate(texts):
                more = text.take(_valid(tokens[i]), self.stops)
                if more and self.stream is not None:
                    self.stream(rows[i] + first, more)
                done[i] |= text.stopped
            if done.all() or int(state.count) >= self.most:
                return self._completions(state, texts)
            state = dataclasses.replace(state, ended=put(done))
            until = min(int(state.count) + step, self.most)
            state = decode(model, rule, self.params, state, np.int32(until))

    def _completions(self, state: State, texts: Sequence[_Text]) -> list[Completion]:
        log_probs, ends = np.asarray(state.log_probs), set(self.ends.tolist())
        found: list[Completion] = []
        for i, text in enumerate(texts):
            tokens, own = text.tokens, log_probs[i, : len(text.tokens)]
            if not np.isfinite(own).all():
                raise DataError("the logits are not finite: the parameters have diverged")
            ending = "stop" if text.stopped else "end" if tokens[-1] in ends else "length"
            found.append(Completion(tuple(tokens), tuple(own.tolist()), ending))
        return found


class _Text:
    """The tokens of a text so far, on the host."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.stopped = False

    def take(
        self, tokens: Sequence[int], stops: Callable[[Sequence[int]], bool] | None
    ) -> Sequence[int]:
        """Take the tokens up to the first with which the caller stops the text.

        Args:
            tokens: all tokens of the text.
            stops: see `complete`.

        Returns:
            The tokens that are new.
        """
        before = len(self.tokens)
        if self.stopped:
            return ()
        size = len(tokens)
        if stops is not None and stops(tokens):
            self.stopped = True
            size = next(n for n in range(before, size + 1) if n and stops(tokens[:n]))
        self.tokens = list(tokens[:size])
        return self.tokens[before:]


def _valid(row: np.ndarray[Any, Any]) -> list[int]:
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
    try:
        listed: Any = [*eos] if isinstance(eos, Iterable) and not hasattr(eos, "dtype") else eos
        tokens = np.atleast_1d(np.asarray(listed))
    except (TypeError, ValueError):
        tokens = np.zeros((1, 1))
    if tokens.size == 0:
        return frozenset()
    if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer) or tokens.max() >= 2**31:
        raise ConfigError(f"eos: must be token ids, are {show(eos)}")
    return frozenset(int(token) for token in tokens)


def _recorded_ends(model: Pretrained) -> frozenset[int]:
    """Return the tokens that end a text according to the model's files."""
    if model.source is None:
        return frozenset()
    folder = model.source.folder
    file = folder / "generation_config.json"
    own = read_json(file) if file.is_file() else {}
    for config in (own, read_model_config(folder)):
        found = config.get("eos_token_id")
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


def _check_prompts(model: Pretrained, prompts: Any) -> list[np.ndarray[Any, Any]]:
    """Return the prompts as arrays.

    Raises:
        DataError: They are not lists of token ids of the vocabulary; it names the first problem.
    """
    if not hasattr(prompts, "__len__") or isinstance(prompts, str | bytes):
        raise DataError(f"prompts: must be a list of lists of token ids, are {show(prompts)}")
    return [_ids(i, prompt, model.config.vocab_size) for i, prompt in enumerate(prompts)]


def _ids(i: int, prompt: Any, vocab: int) -> np.ndarray[Any, Any]:
    if isinstance(prompt, str):
        raise DataError(
            f"prompts[{i}]: is a text; tokenize it first; a prompt is a list of token ids"
        )
    try:
        ids = np.asarray(prompt)
    except ValueError:
        ids = np.zeros((), object)
    if ids.ndim == 1 and not ids.size:
        raise DataError(f"prompts[{i}]: is empty; a prompt is a list of token ids")
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"prompts[{i}]: must be a list of token ids, is {show(prompt)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab:
        raise DataError(
            f"prompts[{i}]: {low if low < 0 else high} is outside the vocabulary of {vocab};"
            " check the tokenizer"
        )
    return ids.astype(np.int32)


def _integer(name: str, value: Any, least: int, most: int = 2**31 - 1) -> int:
    """Return an integer option.

    Raises:
        ConfigError: It is not an integer, or out of range.
    """
    found = number(value)
    if found is None or not found.is_integer() or not least <= found <= most:
        raise ConfigError(f"{name}: must be an integer of at least {least}, is {show(value)}")
    return int(value)


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
