"""Parts that the architectures share: norms, dropout, activations, attention, and the stack of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.models.base import Options

Array = jax.Array


class RMSNorm(nn.Module):
    """`scale * x / sqrt(mean(x^2) + eps)` over the last axis, computed in float32 (Zhang and Sennrich 2019, equation 4)."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises `[..., d]`; the result has the dtype of the activations."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        normal = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + self.eps)
        return (normal * scale.astype(jnp.float32)).astype(self.dtype)


class LayerNorm(nn.Module):
    """`scale * (x - mean) / sqrt(var + eps) + bias` over the last axis, computed in float32 (Ba et al. 2016)."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Normalises `[..., d]`; the result has the dtype of the activations."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - jnp.mean(x, -1, keepdims=True)
        normal = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), -1, keepdims=True) + self.eps)
        return (normal * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def dropout(module: nn.Module, rate: float, x: Array) -> Array:
    """Applies dropout in a training call, that is, one that was given a `dropout` key (Srivastava et al. 2014).

    Args:
        module: whose key stream is used.
        rate: probability of a zero, to the nearest of 65536 steps.
        x: any shape but a scalar.

    Returns:
        The shape and dtype of `x`.
    """
    kept_steps = round((1 - rate) * _STEPS)
    if kept_steps == _STEPS or not module.has_rng("dropout"):
        return x
    draws = _draws(module.make_rng("dropout"), x.shape)
    return jnp.where(draws < kept_steps, x * jnp.asarray(_STEPS / max(kept_steps, 1), x.dtype), jnp.zeros((), x.dtype))


_STEPS = 1 << 16


def _draws(key: Array, shape: tuple[int, ...]) -> Array:
    """Draws uniform uint16 numbers, two from each 32 bits that the generator makes: they are most of dropout's cost."""
    words = jax.random.bits(key, (*shape[:-1], -(-shape[-1] // 2)), jnp.uint32)
    halves = jax.lax.bitcast_convert_type(words, jnp.uint16)
    return halves.reshape(*shape[:-1], -1)[..., : shape[-1]]


def dense(features: int, name: str, options: Options, *, bias: bool = True) -> nn.Dense:
    """Makes a linear module that computes in the activations' dtype."""
    return nn.Dense(features, use_bias=bias, dtype=options.dtype, name=name)


class Joining(nn.Dense):
    """A linear module that writes to the residual stream: where a sub-layer's output joins it is a method of its own."""

    def join(self, h: Array, residual: Array, norm: Callable[[Array], Array] | None = None) -> Array:
        """Gives `residual + h`, normalised where a layer normalises behind the sum.

        Args:
            h: `[..., d]`, the sub-layer's output.
            residual: `[..., d]`, what the sub-layer was given, before its own norm.
            norm: the norm behind the sum, if there is one.
        """
        out = residual + h
        return out if norm is None else norm(out)


def joining(features: int, name: str, options: Options, *, bias: bool = True) -> Joining:
    """Makes a linear module that writes to the residual stream."""
    return Joining(features, use_bias=bias, dtype=options.dtype, name=name)


def head_dense(features: int, name: str, *, bias: bool = True) -> nn.Dense:
    """Makes a linear module of a task head: float32, whatever the base."""
    return nn.Dense(features, use_bias=bias, dtype=jnp.float32, name=name, kernel_init=nn.initializers.normal(0.02))


def allowed(attention_mask: Array | None, segment_ids: Array | None, length: int, *, causal: bool) -> Array | None:
    """Says which position may attend to which.

    Args:
        attention_mask: `[batch, length]`, 1 for a token.
        segment_ids: `[batch, length]`; a position sees its own segment only.
        length: of the rows.
        causal: whether a position sees only itself and those before it.

    Returns:
        bool, broadcast to `[batch, 1, query, key]`; None where everything is allowed.
    """
    parts: list[Array] = []
    if attention_mask is not None:
        parts.append(attention_mask.astype(bool)[:, None, None, :])
    if segment_ids is not None:
        parts.append((segment_ids[:, :, None] == segment_ids[:, None, :])[:, None])
    if causal:
        parts.append(jnp.tril(jnp.ones((1, 1, length, length), bool)))
    mask: Array | None = None
    for part in parts:
        mask = part if mask is None else mask & part
    return mask


@dataclass(frozen=True)
class Virtual:
    """Positions in front of a row's tokens that no token stands at; every token sees them, in each segment of a packed row.

    Attributes:
        past: `[layers, 2, batch or 1, n, kv_heads * d]`: the keys (rotated already) and values of each layer; or None.
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
        """Puts the prompt in front of embeddings `[batch, length, hidden]`."""
        if self.prompt is None:
            return x
        prompt = jnp.broadcast_to(self.prompt.astype(x.dtype), (x.shape[0], *self.prompt.shape[-2:]))
        return jnp.concatenate([prompt, x], axis=1)

    def positions(self, where: Array) -> Array:
        """Gives the positions of prompt and tokens `[batch, prompted + length]`, from the tokens' own, which are shifted."""
        where = where + self.count
        if self.prompt is None:
            return where
        own = jnp.arange(self.count - self.prompted, self.count, dtype=where.dtype)
        return jnp.concatenate([jnp.broadcast_to(own, (where.shape[0], self.prompted)), where], axis=1)

    def mask(self, mask: Array | None, length: int, *, causal: bool) -> Array | None:
        """Widens what may be attended to by the virtual positions, which every query sees but a prompt's its future.

        Args:
            mask: bool, broadcast to `[batch, 1, length, length]`, None where everything is allowed.
            length: of the tokens.
            causal: whether a position sees only itself and those before it.

        Returns:
            bool, broadcast to `[batch, 1, prompted + length, count + length]`, or None.
        """
        if mask is None or not self.count:
            return mask
        lead = mask.shape[:2]
        mask = jnp.broadcast_to(mask, (*lead, length, length))
        past = self.count - self.prompted
        if self.prompted:
            # a prompt sees the tokens that the last query sees: all but padding, where rows are no documents
            after = (
                jnp.zeros((*lead, self.prompted, length), bool) if causal else mask[:, :, -1:].repeat(self.prompted, 2)
            )
            mask = jnp.concatenate([after, mask], axis=2)
            own = jnp.ones((self.prompted + length, self.prompted), bool)
            own = jnp.tril(own) if causal else own
            mask = jnp.concatenate([jnp.broadcast_to(own, (*lead, *own.shape)), mask], axis=3)
        return jnp.concatenate([jnp.ones((*mask.shape[:3], past), bool), mask], axis=3)

    def places(self, segment_ids: Array | None, length: int) -> Array:
        """Gives the place of each key, `[batch or 1, count + length]`: virtual positions, then tokens, in each segment anew."""
        own = positions(segment_ids, 1 if segment_ids is None else segment_ids.shape[0], length) + self.count
        front = jnp.broadcast_to(jnp.arange(self.count, dtype=own.dtype), (own.shape[0], self.count))
        return jnp.concatenate([front, own], axis=1)


PAST = "past"
"""The collection in which a caller finds the keys and values of each layer, `[2, batch, length, kv_heads * d]`, if it asks."""


def before(module: nn.Module, past: Array | None, k: Array, v: Array) -> tuple[Array, Array]:
    """Puts keys and values of virtual positions in front of a layer's own.

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
    """Gives `[batch, length]` positions that count from zero, in each segment anew."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    begins = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def attend(module: nn.Module, q: Array, k: Array, v: Array, mask: Array | None, dropout_rate: float) -> Array:
    """Scaled dot-product attention; several query heads may share a key head (Ainslie et al. 2023).

    `softmax(q k^T / sqrt(d)) v`, scores and softmax in float32.

    Args:
        module: whose dropout key is used.
        q: `[batch, query, heads, d]`.
        k: `[batch, key, kv_heads, d]`, kv_heads divides heads.
        v: `[batch, key, kv_heads, d]`.
        mask: bool, broadcast to `[batch, 1, query, key]`; a row without any True gives an average, not NaN.
        dropout_rate: on the attention weights.

    Returns:
        `[batch, query, heads * d]`.
    """
    batch, length, heads, d = q.shape
    # Heads before length: both products are then plain batched matmuls, a fifth faster on CPU than the other order.
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, d)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * (d**-0.5)
    scores = scores.reshape(batch, heads, length, keys)
    if mask is not None:
        scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = dropout(module, dropout_rate, jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bhts,bhsd->bhtd", weights.reshape(batch, kv_heads, -1, keys), v)
    out = jnp.swapaxes(out.reshape(batch, heads, length, d), 1, 2)
    return checkpoint_name(out.reshape(batch, length, heads * d), "attention")


def run_layers(
    block: type[nn.Module], fields: Mapping[str, Any], count: int, name: str, options: Options, *inputs: Any
) -> Array:
    """Runs a stack of layers, scanned or unrolled, in the scope of the calling module.

    Args:
        block: a module class; called with `(x, per_layer, *shared)`, it gives `(x, None)`.
        fields: its fields.
        count: number of layers.
        name: of the stack in the tree, `layers` or `layer`.
        options: `scan_layers` and `remat`.
        *inputs: `x`; then a pytree with a leading layer axis, or None; then what all layers share.

    Returns:
        The last layer's `x`.
    """
    remat_block = _remat(block, options)
    if not options.scan_layers:
        return _Unrolled(remat_block, dict(fields), count, name=name)(*inputs)
    axes: Any = (0, *(nn.broadcast for _ in inputs[2:]))
    scanned = nn.scan(
        remat_block,
        variable_axes={"params": 0, PAST: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=axes,
        length=count,
    )
    return scanned(**fields, name=name)(*inputs)[0]


def _remat(block: type[nn.Module], options: Options) -> Any:
    """Wraps a block so that the backward pass computes again what the policy does not keep."""
    if options.remat == "none":
        return block
    policies: dict[str, Any] = {
        "full": None,
        "attention": jax.checkpoint_policies.save_only_these_names("attention"),
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    return nn.remat(block, policy=policies[options.remat], prevent_cse=not options.scan_layers)


class _Unrolled(nn.Module):
    """The layers one after the other, named by their numbers."""

    block: Any
    fields: Mapping[str, Any]
    count: int

    @nn.compact
    def __call__(self, x: Array, per_layer: Any, *shared: Any) -> Array:
        for i in range(self.count):
            own = jax.tree.map(lambda leaf, i=i: leaf[i], per_layer)
            x, _ = self.block(**self.fields, name=str(i))(x, own, *shared)
        return x


def pool(x: Array, attention_mask: Array | None, how: str | None) -> Array:
    """Gives one vector a row.

    Args:
        x: `[batch, length, d]`.
        attention_mask: `[batch, length]`, 1 for a token, padded on either side.
        how: `cls` for the first place, `mean` for the mean over tokens (in float32), `last` for the last token.

    Returns:
        `[batch, d]`.
    """
    if how == "cls":
        return x[:, 0]
    mask = jnp.ones(x.shape[:2], jnp.int32) if attention_mask is None else attention_mask.astype(jnp.int32)
    if how == "last":
        index = jnp.argmax(jnp.arange(x.shape[1], dtype=jnp.int32) * mask, axis=1)
        return jnp.take_along_axis(x, index[:, None, None], axis=1)[:, 0]
    weights = mask.astype(jnp.float32)[..., None]
    total = jnp.sum(x.astype(jnp.float32) * weights, axis=1)
    return (total / jnp.maximum(jnp.sum(weights, axis=1), 1.0)).astype(x.dtype)
