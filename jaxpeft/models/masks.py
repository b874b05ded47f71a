"""Attention masks, and virtual positions in front of a row's tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.errors import DataError
from jaxpeft.models.kv_cache import Cache, sow_keys, visible
from jaxpeft.sharding.logical_axes import BATCH, LENGTH, constrain

Array = jax.Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["dense", "text", "segments"],
    meta_fields=["causal", "window"],
)
@dataclass(frozen=True)
class Mask:
    """An attention mask, as the conjunction of its parts.

    With `segments` or `causal`, queries and keys have the same positions.

    Attributes:
        dense: bool, broadcast to `[batch, 1, query, key]`; None if everything is visible.
        text: bool `[batch, key]`, the visible keys; None for all.
        segments: `[batch, length]`, segment ids: a position only attends to its own segment; None
            if rows are not packed.
        causal: whether a position only attends to itself and earlier ones.
        window: window size, including the position itself, if `causal`; 0 for no limit.
    """

    dense: Array | None = None
    text: Array | None = None
    segments: Array | None = None
    causal: bool = False
    window: int = 0

    def row_mask(self) -> Array | None:
        """Return the parts that depend on the rows as one array; None if everything is visible.

        The array broadcasts to `[batch, 1, query, key]`.
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
        """Return the full mask as one array; None if everything is visible.

        The array broadcasts to `[batch, 1, query, key]`.
        """
        rows = self.row_mask()
        if not self.causal:
            return rows
        seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
        if self.window:
            seen = seen & ~jnp.tril(seen, -self.window)
        return seen if rows is None else seen & rows

    def prepare(self, kernel: str, length: int) -> Mask:
        """Return the mask in the form that a kernel needs, computed once for all layers."""
        if kernel != "xla":
            return self
        full = self.to_array(length)
        return Mask(full if full is None else constrain(full, BATCH, None, LENGTH, None))

    def restrict(self, near: Array) -> Mask:
        """Restrict the mask to `near`, bool, broadcast to `[batch, 1, query, key]`."""
        return dataclasses.replace(self, dense=near if self.dense is None else self.dense & near)


def make_mask(
    attention_mask: Array | None, segment_ids: Array | None, *, causal: bool, window: int = 0
) -> Mask:
    """Return the attention mask of a batch.

    Args:
        attention_mask: `[batch, length]`, 1 for a token; None if there is no padding.
        segment_ids: `[batch, length]`; a position only attends to its own segment.
        causal: whether a position only attends to itself and earlier ones.
        window: window size, including the position itself; 0 for no limit.
    """
    text = None if attention_mask is None else attention_mask.astype(bool)
    return Mask(None, text, segment_ids, causal, window)


@partial(jax.tree_util.register_dataclass, data_fields=["text", "runs"], meta_fields=[])
@dataclass(frozen=True)
class TextRows:
    """The padding and the documents of rows, for layers that compute along them.

    Attributes:
        text: bool `[batch, length]`, false for padding; None if there is none.
        runs: int32 `[batch, length]`, the number of the document of each position in its row, from
            zero; None if there is only one.
    """

    text: Array | None = None
    runs: Array | None = None

    def without_padding(self, x: Array) -> Array:
        """Return `x [batch, length, d]` with zeros for padding."""
        return (
            x if self.text is None else jnp.where(self.text[..., None], x, jnp.zeros((), x.dtype))
        )

    def last(self, x: Array, count: int) -> Array:
        """Return the last positions up to the last token of each row, `[batch, count, d]`.

        Args:
            x: `[batch, count + length, d]`, with positions before the row.
            count: their number.
        """
        if self.text is None:
            return x[:, x.shape[1] - count :]
        after = jnp.arange(1, self.text.shape[1] + 1, dtype=jnp.int32)
        ends = jnp.max(jnp.where(self.text, after, 0), axis=1)
        at = ends[:, None] + jnp.arange(count, dtype=jnp.int32)
        return jnp.take_along_axis(x, at[..., None], axis=1)


@dataclass(frozen=True)
class Virtual:
    """Virtual positions in front of a row's tokens; every token attends to them, in each segment of
    a packed row.

    Attributes:
        past: `[layers, 2, batch or 1, n, kv_heads * d]`, the keys (already rotated) and values of
            each layer, which takes the part that fits its heads; or None.
        prompt: `[batch or 1, n, hidden]`, embeddings that run through all layers; or None.
        cached: number of positions of a prompt that has run through the layers in an earlier call,
            whose keys are in a KV cache.
    """

    past: Array | None = None
    prompt: Array | None = None
    cached: int = 0

    @property
    def count(self) -> int:
        """The number of virtual positions."""
        parts = (part.shape[-2] for part in (self.past, self.prompt) if part is not None)
        return sum(parts) + self.cached

    @property
    def prompted(self) -> int:
        """The number of virtual positions that run through the layers."""
        return 0 if self.prompt is None else self.prompt.shape[-2]

    def require_unpacked(self, segment_ids: Array | None) -> None:
        """Reject a prompt that attends to later tokens in packed rows.

        Raises:
            DataError: There are both.
        """
        if self.prompted and segment_ids is not None:
            raise DataError(
                "segment_ids: a prompt attends to all tokens of a row, so rows cannot be packed;"
                " disable packing"
            )

    def after_prompt(self) -> Virtual:
        """Return the virtual positions of a later call, with the keys of the prompt in a cache."""
        return Virtual(self.past, None, self.prompted)

    def prepend(self, x: Array) -> Array:
        """Put the prompt in front of embeddings `[batch, length, hidden]`."""
        if self.prompt is None:
            return x
        prompt = jnp.broadcast_to(
            self.prompt.astype(x.dtype), (x.shape[0], *self.prompt.shape[-2:])
        )
        return jnp.concatenate([prompt, x], axis=1)

    def positions(self, where: Array) -> Array:
        """Return the positions of prompt and tokens, `[batch, prompted + length]`, from the
        tokens' unshifted ones.
        """
        where = where + self.count
        if self.prompt is None:
            return where
        own = jnp.arange(self.count - self.prompted, self.count, dtype=where.dtype)
        return jnp.concatenate(
            [jnp.broadcast_to(own, (where.shape[0], self.prompted)), where], axis=1
        )

    def mask(self, mask: Mask, length: int) -> Mask:
        """Extend a mask by the virtual positions, which are visible to every query.

        A causal prompt does not attend to later positions.

        Args:
            mask: mask of the tokens.
            length: number of tokens.

        Returns:
            The mask `[batch, 1, prompted + length, count + length]`.
        """
        seen = mask.to_array(length) if self.count else None
        if seen is None:
            return mask
        lead = seen.shape[:2]
        seen = jnp.broadcast_to(seen, (*lead, length, length))
        past = self.count - self.prompted
        if self.prompted:
            # a prompt attends to the tokens that the last query attends to: all except padding,
            # since rows are not packed
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

    def mask_with_cache(
        self, cache: Cache, where: Array, attention_mask: Array | None
    ) -> tuple[Mask, Array]:
        """Return the mask of a call with a KV cache, and the position of each key.

        The keys are those of the cache, of the past, and of this call's tokens.

        Args:
            cache: the KV cache.
            where: `[batch, length]`, unshifted positions of the tokens.
            attention_mask: `[batch, length]`, 1 for a token; None if there is no padding.

        Returns:
            The mask `[batch, 1, length, key]`, and the positions `[batch, key]`, negative for
            empty slots and padding.
        """
        queries = where + self.count
        past = jnp.arange(self.count - self.cached, dtype=where.dtype)
        own = self.key_positions(queries, attention_mask)
        keys = jnp.concatenate(
            [cache.positions, jnp.broadcast_to(past, (len(where), len(past))), own], axis=1
        )
        return Mask(visible(queries, keys)), keys

    def key_positions(self, where: Array, attention_mask: Array | None) -> Array:
        """Return the positions of prompt and tokens, negative for padding.

        Args:
            where: `[batch, prompted + length]`, their positions.
            attention_mask: `[batch, length]`, 1 for a token; None if there is no padding.
        """
        text = self.text(attention_mask)
        return where if text is None else jnp.where(text, where, -1)

    def text(self, attention_mask: Array | None) -> Array | None:
        """Return which positions of prompt and tokens are not padding.

        Args:
            attention_mask: `[batch, length]`, 1 for a token; None if there is no padding.

        Returns:
            bool `[batch, prompted + length]`, or None.
        """
        if attention_mask is None:
            return None
        text = attention_mask.astype(bool)
        return jnp.pad(text, ((0, 0), (self.prompted, 0)), constant_values=True)

    def places(self, segment_ids: Array | None, length: int) -> Array:
        """Return the position of each key, `[batch or 1, count + length]`, restarting in each
        segment.
        """
        own = (
            positions(segment_ids, 1 if segment_ids is None else segment_ids.shape[0], length)
            + self.count
        )
        front = jnp.broadcast_to(
            jnp.arange(self.count, dtype=own.dtype), (own.shape[0], self.count)
        )
        return jnp.concatenate([front, own], axis=1)


def prepend_virtual(
    module: nn.Module, past: Array | None, k: Array, v: Array
) -> tuple[Array, Array]:
    """Prepend the keys and values of virtual positions to a layer's own.

    Args:
        module: the attention module, which sows its own keys and values.
        past: `[2, batch or 1, n, kv_heads * d]`, or None.
        k: `[batch, length, kv_heads, d]`, rotated.
        v: `[batch, length, kv_heads, d]`.
    """
    sow_keys(module, k, v)
    if past is None:
        return k, v
    own = jnp.broadcast_to(past.astype(k.dtype), (2, k.shape[0], *past.shape[2:]))
    own = own.reshape(*own.shape[:3], *k.shape[2:])
    return jnp.concatenate([own[0], k], axis=1), jnp.concatenate([own[1], v], axis=1)


def positions(segment_ids: Array | None, batch: int, length: int) -> Array:
    """Return `[batch, length]` positions from zero, restarting in each segment."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    return index - jax.lax.cummax(jnp.where(_begins(segment_ids), index, 0), axis=1)


def runs(segment_ids: Array | None) -> Array | None:
    """Return the number of the segment of each position in its row, int32 `[batch, length]` from
    zero; None for one segment.
    """
    if segment_ids is None:
        return None
    return jnp.cumsum(_begins(segment_ids), axis=1, dtype=jnp.int32) - 1


def _begins(segment_ids: Array) -> Array:
    """Return where segments begin, bool `[batch, length]`."""
    first = jnp.ones((segment_ids.shape[0], 1), bool)
    return jnp.concatenate([first, segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
