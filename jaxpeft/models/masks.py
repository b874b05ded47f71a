"""What a position may see: the mask of a batch, and virtual positions in front of its tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models.base import PAST
from jaxpeft.sharding.logical_axes import BATCH, LENGTH, constrain

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["dense", "text", "segments"],
    meta_fields=["causal", "window"],
)
@dataclass(frozen=True)
class Mask:
    """Which position may attend to which: all that the parts allow.

    Attributes:
        dense: bool, broadcast to `[batch, 1, query, key]`; None where everything is allowed.
        text: bool `[batch, key]`: which keys are seen; None for all.
        segments: `[batch, length]`: a position sees its own segment only; None where rows are
            whole. Queries and keys are then the same positions, and so they are where `causal`.
        causal: whether a position sees only itself and those before it.
        window: how many positions back, itself included, where `causal`; 0 for all.
    """

    dense: Array | None = None
    text: Array | None = None
    segments: Array | None = None
    causal: bool = False
    window: int = 0

    def row_mask(self) -> Array | None:
        """Return what depends on the rows as one array, broadcast to `[batch, 1, query, key]`; None
        where everything is allowed.
        """
        parts = [] if self.dense is None else [self.dense]
        if self.text is not None:
            parts.append(self.text[:, None, None, :])
        if self.segments is not None:
            parts.append((self.segments[:, :, None] == self.segments[:, None, :])[:, None])
        found: Array | None = None
        for part in parts:
            found = part if found is None else found & part
        return found

    def to_array(self, length: int) -> Array | None:
        """Return all of it as one array, broadcast to `[batch, 1, query, key]`; None where
        everything is allowed.
        """
        given = self.row_mask()
        if not self.causal:
            return given
        seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
        if self.window:
            seen = seen & ~jnp.tril(seen, -self.window)
        return seen if given is None else seen & given

    def prepare(self, kernel: str, length: int) -> Mask:
        """Return the same as a kernel takes it, made once for all layers."""
        if kernel != "xla":
            return self
        full = self.to_array(length)
        return Mask(full if full is None else constrain(full, BATCH, None, LENGTH, None))

    def restrict(self, near: Array) -> Mask:
        """Narrow it to where `near`, bool, broadcast to `[batch, 1, query, key]`, is true."""
        return dataclasses.replace(self, dense=near if self.dense is None else self.dense & near)


def make_mask(
    attention_mask: Array | None, segment_ids: Array | None, *, causal: bool, window: int = 0
) -> Mask:
    """Return which position may attend to which.

    Args:
        attention_mask: `[batch, length]`, 1 for a token; None for tokens alone.
        segment_ids: `[batch, length]`; a position sees its own segment only.
        causal: whether a position sees only itself and those before it.
        window: how many positions back, itself included; 0 for all.
    """
    text = None if attention_mask is None else attention_mask.astype(bool)
    return Mask(None, text, segment_ids, causal, window)


@dataclass(frozen=True)
class Virtual:
    """Positions in front of a row's tokens that no token stands at; every token sees them, in each
    segment of a packed row.

    Attributes:
        past: `[layers, 2, batch or 1, n, kv_heads * d]`: the keys (rotated already) and values of
            each layer; or None.
        prompt: `[batch or 1, n, hidden]`: embeddings that run through all layers; or None.
    """

    past: Array | None = None
    prompt: Array | None = None

    @property
    def count(self) -> int:
        """How many positions they take."""
        return sum(part.shape[-2] for part in (self.past, self.prompt) if part is not None)

    @property
    def prompted(self) -> int:
        """How many of them run through the layers."""
        return 0 if self.prompt is None else self.prompt.shape[-2]

    def prepend(self, x: Array) -> Array:
        """Put the prompt in front of embeddings `[batch, length, hidden]`."""
        if self.prompt is None:
            return x
        prompt = jnp.broadcast_to(
            self.prompt.astype(x.dtype), (x.shape[0], *self.prompt.shape[-2:])
        )
        return jnp.concatenate([prompt, x], axis=1)

    def positions(self, where: Array) -> Array:
        """Return the positions of prompt and tokens `[batch, prompted + length]`, from the tokens'
        own, which are shifted.
        """
        where = where + self.count
        if self.prompt is None:
            return where
        own = jnp.arange(self.count - self.prompted, self.count, dtype=where.dtype)
        return jnp.concatenate(
            [jnp.broadcast_to(own, (where.shape[0], self.prompted)), where], axis=1
        )

    def mask(self, mask: Mask, length: int) -> Mask:
        """Widen what tokens may attend to by the virtual positions, which every query sees but a
        prompt's its future.

        Args:
            mask: of the tokens.
            length: of the tokens.

        Returns:
            That of `[batch, 1, prompted + length, count + length]`.
        """
        seen = mask.to_array(length) if self.count else None
        if seen is None:
            return mask
        lead = seen.shape[:2]
        seen = jnp.broadcast_to(seen, (*lead, length, length))
        past = self.count - self.prompted
        if self.prompted:
            # a prompt sees the tokens that the last query sees: all but padding, where rows are no
            # documents
            after = (
                jnp.zeros((*lead, self.prompted, length), bool)
                if mask.causal
                else seen[:, :, -1:].repeat(self.prompted, 2)
            )
            seen = jnp.concatenate([after, seen], axis=2)
            own = jnp.ones((self.prompted + length, self.prompted), bool)
            own = jnp.tril(own) if mask.causal else own
            seen = jnp.concatenate([jnp.broadcast_to(own, (*lead, *own.shape)), seen], axis=3)
        return Mask(jnp.concatenate([jnp.ones((*seen.shape[:3], past), bool), seen], axis=3))

    def places(self, segment_ids: Array | None, length: int) -> Array:
        """Return the place of each key, `[batch or 1, count + length]`: virtual positions, then
        tokens, in each segment anew.
        """
        own = (
            positions(segment_ids, 1 if segment_ids is None else segment_ids.shape[0], length)
            + self.count
        )
        front = jnp.broadcast_to(
            jnp.arange(self.count, dtype=own.dtype), (own.shape[0], self.count)
        )
        return jnp.concatenate([front, own], axis=1)


def before(module: nn.Module, past: Array | None, k: Array, v: Array) -> tuple[Array, Array]:
    """Put keys and values of virtual positions in front of a layer's own.

    Args:
        module: the attention, which keeps its own keys and values for a caller that asks for them.
        past: `[2, batch or 1, n, kv_heads * d]`, or None.
        k: `[batch, length, kv_heads, d]`, rotated.
        v: likewise, not rotated.
    """
    if module.is_mutable_collection(PAST) and not module.is_initializing():
        module.sow(PAST, "kv", jnp.stack([k, v]).reshape(2, *k.shape[:2], -1))
    if past is None:
        return k, v
    own = jnp.broadcast_to(past.astype(k.dtype), (2, k.shape[0], *past.shape[2:]))
    own = own.reshape(*own.shape[:3], *k.shape[2:])
    return jnp.concatenate([own[0], k], axis=1), jnp.concatenate([own[1], v], axis=1)


def positions(segment_ids: Array | None, batch: int, length: int) -> Array:
    """Return `[batch, length]` positions that count from zero, in each segment anew."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    begins = jnp.concatenate(
        [jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1
    )
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)
