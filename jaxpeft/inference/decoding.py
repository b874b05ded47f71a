"""Compiled text generation: prefill, which runs the prompts, and decode, which adds tokens.

The prompts of a batch are padded on the right. The cache has a slot for each of their positions,
and after these one slot for each new token, the same for all rows; `Cache.positions` says which
position it holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpeft.forward import run
from jaxpeft.inference.sampling import SamplingRule
from jaxpeft.models.base import PAST, Pretrained
from jaxpeft.models.kv_cache import Cache, allocate, append, read_sown
from jaxpeft.sharding.logical_axes import constrain, on_mesh

Array = jax.Array
Params = Mapping[str, Any]
NO_TOKEN = -1
"""Fills the places of tokens after the end of a text."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "cache",
        "tokens",
        "log_probs",
        "last",
        "sizes",
        "ended",
        "count",
        "seen",
        "keys",
        "adapter",
        "ends",
        "numbers",
    ],
    meta_fields=["prompt_slots"],
)
@dataclass(frozen=True)
class State:
    """A batch of texts that are being generated.

    Attributes:
        cache: keys and values of all tokens but the last.
        tokens: `[batch, max_new_tokens]` int32, the new tokens; `NO_TOKEN` after the end of a text.
        log_probs: `[batch, max_new_tokens]` float32, their log-probabilities.
        last: `[batch]` int32, the token to run next.
        sizes: `[batch]` int32, the number of tokens of each prompt.
        ended: bool `[batch]`, whether a text has ended.
        count: int32, the number of new tokens of a text that has not ended.
        seen: bool `[batch, vocab]`, the tokens of prompt and text, if a penalty needs them.
        keys: `[batch]`, the random key of each row.
        adapter: adapter index in an adapter stack, a scalar or `[batch]`, or None.
        ends: `[n]` int32, the tokens that end a text.
        numbers: numbers by which tokens are chosen, see `Sampling.numbers`.
        prompt_slots: number of the cache's slots for virtual tokens and prompts, before those of
            the new tokens.
    """

    cache: Cache
    tokens: Array
    log_probs: Array
    last: Array
    sizes: Array
    ended: Array
    count: Array
    seen: Array | None
    keys: Array
    adapter: Array | None
    ends: Array
    numbers: Mapping[str, Array]
    prompt_slots: int


def _prefill(
    model: Pretrained,
    rule: SamplingRule,
    most: int,
    params: Params,
    ids: Array,
    sizes: Array,
    keys: Array,
    ends: Array,
    adapter: Array | None,
    numbers: Mapping[str, Array],
) -> State:
    """Run the prompts, and choose the first token of each text.

    Args:
        model: a decoder with a language-model head.
        rule: how tokens are chosen.
        most: number of new tokens for which there is room.
        params: its parameters, with adapters.
        ids: `[batch, length]`, padded on the right.
        sizes: see `State`.
        keys: uint32 `[batch, n]`, the data of the random keys.
        ends: see `State`.
        adapter: see `State`.
        numbers: see `State`.
    """
    (batch, length), rows = ids.shape, jnp.arange(ids.shape[0])
    places = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), ids.shape)
    text = (places < sizes[:, None]).astype(jnp.int32)
    hidden, sown = run(
        model,
        params,
        ids,
        text,
        # dynamic RoPE depends on the largest position, which is not that of padding
        position_ids=jnp.minimum(places, sizes[:, None] - 1),
        hidden=True,
        mutable=[PAST],
        adapter=adapter,
    )
    own = read_sown(sown[PAST])
    cache = append(allocate(own, own.slots + most - 1), own, 0)
    last = jnp.take_along_axis(hidden, (sizes - 1)[:, None, None], axis=1)
    logits = _logits(model, params, last, adapter)
    seen = None
    if rule.penalizes:
        seen = jnp.zeros(logits.shape, bool).at[rows[:, None], ids].max(text > 0)
    state = State(
        cache=cache,
        tokens=jnp.full((batch, most), NO_TOKEN, jnp.int32),
        log_probs=jnp.zeros((batch, most), jnp.float32),
        last=jnp.zeros(batch, jnp.int32),
        sizes=sizes,
        ended=jnp.zeros(batch, bool),
        count=jnp.zeros((), jnp.int32),
        seen=seen,
        keys=jax.random.wrap_key_data(keys),
        adapter=adapter,
        ends=ends,
        numbers=numbers,
        prompt_slots=own.slots,
    )
    return _readable(_extend(state, rule, logits))


def _decode(
    model: Pretrained, rule: SamplingRule, params: Params, state: State, until: Array
) -> State:
    """Add tokens until the texts have `until` new tokens, or all have ended.

    Args:
        model: see `_prefill`.
        rule: see `_prefill`.
        params: see `_prefill`.
        state: the batch, whose memory is reused.
        until: int32 scalar, at most the number of new tokens that the state has room for.
    """

    def step(state: State) -> State:
        at = state.sizes + state.count - 1
        hidden, sown = run(
            model,
            params,
            state.last[:, None],
            position_ids=at[:, None],
            cache=state.cache,
            hidden=True,
            mutable=[PAST],
            adapter=state.adapter,
        )
        slot = state.prompt_slots - 1 + state.count
        cache = append(state.cache, read_sown(sown[PAST]), slot)
        logits = _logits(model, params, hidden, state.adapter)
        return _extend(dataclasses.replace(state, cache=cache), rule, logits)

    def go_on(state: State) -> Array:
        return (state.count < until) & ~jnp.all(state.ended)

    return _readable(jax.lax.while_loop(go_on, step, state))


def _readable(state: State) -> State:
    """Put what the host reads on every device, so that each process has it."""
    read = ("tokens", "log_probs", "ended", "count")
    arrays = {name: getattr(state, name) for name in read}
    every = {name: constrain(array, *[None] * array.ndim) for name, array in arrays.items()}
    return dataclasses.replace(state, **every)


def _logits(model: Pretrained, params: Params, hidden: Array, adapter: Array | None) -> Array:
    """Return the logits `[batch, vocab]` of hidden states `[batch, 1, d]`."""
    logits = run(model, params, hidden, method="head", adapter=adapter)[:, 0]
    return constrain(logits, None, None)


def _extend(state: State, rule: SamplingRule, logits: Array) -> State:
    """Choose the next token of each text from its logits, and add it."""
    keys = jax.vmap(jax.random.fold_in, (0, None))(state.keys, state.count)
    tokens, log_probs = rule.choose(logits, state.seen, keys, state.numbers)
    written = jnp.where(state.ended, NO_TOKEN, tokens)
    at = (jnp.zeros((), jnp.int32), state.count)
    seen = state.seen
    if seen is not None:
        seen = seen.at[jnp.arange(len(tokens)), tokens].set(True)
    return dataclasses.replace(
        state,
        tokens=jax.lax.dynamic_update_slice(state.tokens, written[:, None], at),
        log_probs=jax.lax.dynamic_update_slice(state.log_probs, log_probs[:, None], at),
        last=tokens,
        ended=state.ended | jnp.any(tokens[:, None] == state.ends, axis=1),
        count=state.count + 1,
        seen=seen,
    )


@lru_cache(maxsize=4)
def programs(mesh: Mesh | None) -> tuple[Any, Any]:
    """Return the compiled `(prefill, decode)` of a mesh."""
    prefill = jax.jit(on_mesh(mesh, _prefill), static_argnums=(0, 1, 2))
    decode = jax.jit(on_mesh(mesh, _decode), static_argnums=(0, 1), donate_argnums=3)
    return prefill, decode
