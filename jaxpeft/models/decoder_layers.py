"""The layers of a decoder: attention and feed-forward, with the parts that its config names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models import rope
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.decoder_config import DecoderConfig
from jaxpeft.models.experts import SparseFeedForward
from jaxpeft.models.layers import (
    RMSNorm,
    dense,
    dropout,
    mark_input,
    mark_product,
    residual_dense,
    scaled,
)
from jaxpeft.models.masks import Mask, prepend_virtual
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, constrain

Array = jax.Array
Finish = Callable[[Array], Array]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cos", "sin", "growth"],
    meta_fields=["interleaved"],
)
@dataclass(frozen=True)
class Rotation:
    """How a layer's queries and keys depend on their positions.

    Attributes:
        cos: cosines of the rotation angles, `[batch, length, 1, d / 2]`.
        sin: sines of the rotation angles.
        growth: factor of the queries, `[batch, length, 1, 1]`, or None.
        interleaved: see `rope.rotate`.
    """

    cos: Array
    sin: Array
    growth: Array | None
    interleaved: bool

    def rotate(self, q: Array, k: Array) -> tuple[Array, Array]:
        """Return the queries and keys `[batch, length, heads, d]` of their positions."""
        q, k = (rope.rotate(x, self.cos, self.sin, interleaved=self.interleaved) for x in (q, k))
        return (q if self.growth is None else scaled(q, self.growth)), k


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["past", "cached", "window", "rope", "mask", "rotation"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LayerInputs:
    """What a layer gets besides the hidden states; its own differ from the shared ones.

    Attributes:
        past: keys and values of virtual positions, see `Virtual`.
        cached: keys and values of earlier tokens, see `Cache`.
        window: its window, an int32 scalar, 0 for no limit: in scanned layers with several windows.
        rope: index of its rotation, an int32 scalar: in scanned layers with several rotations.
        mask: its mask, if it is not the shared one.
        rotation: its rotation, if it is not the shared one.
    """

    past: Any = None
    cached: Any = None
    window: Any = None
    rope: Any = None
    mask: Any = None
    rotation: Any = None


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        residual: Array,
        finish: Finish,
        own: LayerInputs,
        rotation: Rotation,
        mask: Mask,
    ) -> Array:
        """Attend, and add the result to the residual stream.

        Args:
            x: `[batch, length, d]`.
            residual: `x` before the norm.
            finish: what is applied to the result before the sum.
            own: past and cached keys and values.
            rotation: rotation of queries and keys.
            mask: the attention mask.
        """
        c = self.config
        q, k, v = by_heads(self._heads(x))
        if c.qk_norm and not c.wide_qk_norm:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        q, k = rotation.rotate(q, k)
        k, v = prepend_virtual(self, own.past, mark_product(k), mark_product(v))
        sinks = None
        if c.attention_sinks:
            init, shape = nn.initializers.normal(0.02), (c.num_attention_heads,)
            sinks = self.param("sinks", init, shape, jnp.float32)
        out = attend(
            self,
            self.options.attention,
            mark_product(q),
            k,
            v,
            mask,
            c.attention_dropout,
            own.cached,
            c.scoring,
            sinks=sinks,
        )
        o_proj = residual_dense(c.hidden_size, "o_proj", self.options, bias=c.output_bias)
        out = o_proj.join(finish(o_proj(out)), residual)
        return mark_product(constrain(out, BATCH, LENGTH, HIDDEN))

    def _heads(self, x: Array) -> tuple[Array, Array, Array]:
        """Return queries, keys and values, `[batch, length, heads, d]`."""
        c = self.config
        counts = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        widths = [n * c.head_dim for n in counts]
        if c.fused_qkv:
            joint = dense(sum(widths), "qkv_proj", self.options, bias=c.qkv_bias)(x)
            q, k, v = jnp.split(joint, (widths[0], widths[0] + widths[1]), axis=-1)
        else:
            names = ("q_proj", "k_proj", "v_proj")
            first, *others = (
                dense(width, name, self.options, bias=c.qkv_bias)
                for name, width in zip(names, widths, strict=True)
            )
            q, k, v = first.together(x, *others)
        if c.qk_norm and c.wide_qk_norm:
            q, k = self._norm("q_norm")(q), self._norm("k_norm")(k)
        return tuple(y.reshape(*y.shape[:2], -1, c.head_dim) for y in (q, k, v))  # pyright: ignore[reportReturnType]

    def _norm(self, name: str) -> RMSNorm:
        c = self.config
        return RMSNorm(c.rms_norm_eps, self.options.dtype, c.norm_offset, name=name)


class FeedForward(nn.Module):
    """Gated feed-forward: `down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(self, x: Array, residual: Array, finish: Finish) -> Array:
        """Map `x [..., d]` to `[..., d]`, and add it to the residual stream.

        Args:
            x: the normalized residual stream.
            residual: `x` before the norm.
            finish: what is applied to the result before the sum.
        """
        c, options, width = self.config, self.options, self.config.intermediate_size
        if c.fused_gate_up:
            joint = dense(2 * width, "gate_up_proj", options, bias=c.mlp_bias)(x)
            parts: Any = jnp.split(joint, 2, axis=-1)
        else:
            gate_proj, up_proj = (
                dense(width, name, options, bias=c.mlp_bias) for name in ("gate_proj", "up_proj")
            )
            parts = gate_proj.together(x, up_proj)
        gate, up = (mark_product(constrain(y, BATCH, LENGTH, MLP)) for y in parts)
        down_proj = residual_dense(c.hidden_size, "down_proj", options, bias=c.mlp_bias)
        out = finish(down_proj(ACTIVATIONS[c.hidden_act](gate) * up))
        return constrain(down_proj.join(out, residual), BATCH, LENGTH, HIDDEN)


class Block(nn.Module):
    """One decoder layer."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        own: LayerInputs,
        rotation: Rotation,
        mask: Mask,
        places: Array | None,
        real: Array | None = None,
    ) -> tuple[Array, None]:
        """Run the layer.

        Args:
            x: `[batch, length, d]`.
            own: what only this layer gets.
            rotation: rotation of queries and keys; the arrays have a leading axis if `own.rope`
                selects one of several.
            mask: the attention mask.
            places: `[batch or 1, key]`, positions for the windows; None without windows.
            real: `[batch, length]`, 0 for padding; None without experts.
        """
        c, options = self.config, self.options
        x = mark_input(x)
        rotation, mask = own.rotation or rotation, own.mask or mask
        if own.rope is not None:
            rotation = jax.tree.map(lambda tables: tables[own.rope], rotation)
        if own.window is not None and places is not None:
            queries = places[:, -x.shape[1] :]
            apart = queries[:, None, :, None] - places[:, None, None, :]
            mask = mask.restrict((apart < own.window) | (own.window == 0))
        names = c.norms
        h = self._normalize(names.before_attention, x)
        finish = partial(self._finish, names.after_attention)
        x = Attention(c, options, name="self_attn")(h, x, finish, own, rotation, mask)
        h = self._normalize(names.before_mlp, x)
        finish = partial(self._finish, names.after_mlp)
        if c.mixture is None:
            return FeedForward(c, options, name="mlp")(h, x, finish), None
        experts = SparseFeedForward(c.mixture, c.hidden_act, options, name=c.mixture.module)
        return experts(h, x, finish, real), None

    def _normalize(self, name: str, x: Array) -> Array:
        c = self.config
        return (
            RMSNorm(c.rms_norm_eps, self.options.dtype, c.norm_offset, name=name)(x) if name else x
        )

    def _finish(self, name: str, h: Array) -> Array:
        """Return the output of attention or feed-forward as it is added to the residual stream."""
        c = self.config
        h = dropout(self, c.residual_dropout, self._normalize(name, h))
        return h if c.residual_scale == 1 else scaled(h, c.residual_scale)
