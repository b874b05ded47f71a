"""The layers of a decoder: attention and feed-forward, with the parts that its config names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from jaxpeft.models.delta_net import GatedDeltaNet
from jaxpeft.models.experts import SparseFeedForward
from jaxpeft.models.kv_cache import KEYS, VALUES
from jaxpeft.models.latent_attention import latent_heads
from jaxpeft.models.layer_embeddings import add_layer_input
from jaxpeft.models.layers import (
    RMSNorm,
    dense,
    dropout,
    mark_input,
    mark_product,
    normalize,
    residual_dense,
    scaled,
)
from jaxpeft.models.masks import Mask, TextRows, prepend_virtual
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

    def keys(self, k: Array) -> Array:
        """Return the keys `[batch, length, heads, d]` of their positions."""
        return rope.rotate(k, self.cos, self.sin, interleaved=self.interleaved)

    def queries(self, q: Array) -> Array:
        """Return the queries `[batch, length, heads, d]` of their positions."""
        q = self.keys(q)
        return q if self.growth is None else scaled(q, self.growth)


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values", "cached"], meta_fields=[])
@dataclass(frozen=True)
class Kept:
    """The keys and values of a layer, which later layers share.

    Attributes:
        keys: rotated keys `[batch, key, kv_heads, d]` of the call.
        values: its values `[batch, key, kv_heads, d]`.
        cached: those of earlier tokens, see `Cache`, or None.
    """

    keys: Array
    values: Array
    cached: Any


@partial(jax.tree_util.register_dataclass, data_fields=["x", "kept"], meta_fields=[])
@dataclass(frozen=True)
class Stream:
    """What a layer gets from the one before.

    Attributes:
        x: `[batch, length, d]`, the residual stream.
        kept: what later layers share, by the index of its layer, see `DecoderConfig.kept_as`.
    """

    x: Array
    kept: Mapping[int, Kept] = field(default_factory=dict[int, Kept])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["past", "cached", "window", "rope", "mask", "rotation", "embedded"],
    meta_fields=[],
)
@dataclass(frozen=True)
class LayerInputs:
    """What a layer gets besides the hidden states; its own differ from the shared ones.

    Attributes:
        past: keys and values of virtual positions, see `Virtual`.
        cached: what the layer keeps of earlier tokens, by name, see `Cache`.
        window: its window, an int32 scalar, 0 for no limit: in scanned layers with several windows.
        rope: index of its rotation, an int32 scalar: in scanned layers with several rotations.
        mask: its mask, if it is not the shared one.
        rotation: its rotation, if it is not the shared one.
        embedded: its embeddings of the tokens, `[batch, length, w]`, see `layer_embeddings`.
    """

    past: Any = None
    cached: Any = None
    window: Any = None
    rope: Any = None
    mask: Any = None
    rotation: Any = None
    embedded: Any = None


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        stream: Stream,
        finish: Finish,
        own: LayerInputs,
        rotation: Rotation,
        mask: Mask,
    ) -> Stream:
        """Attend, and add the result to the residual stream.

        Args:
            x: `[batch, length, d]`, normalized.
            stream: `x` before the norm, with the keys that layers share.
            finish: what is applied to the result before the sum.
            own: past and cached keys and values.
            rotation: rotation of queries and keys.
            mask: the attention mask.
        """
        c = self.config
        kept = stream.kept
        q, gate, k, v = self._attended(x, own.past, rotation, kept)
        cached = own.cached if c.keys_of is None else kept[c.keys_of].cached
        if c.kept_as is not None:
            kept = {**kept, c.kept_as: Kept(k, v, cached)}
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
            cached and (cached[KEYS], cached[VALUES]),
            c.scoring,
            sinks=sinks,
        )
        if gate is not None:
            out = out * jax.nn.sigmoid(mark_product(gate).reshape(out.shape))
        o_proj = residual_dense(c.hidden_size, "o_proj", self.options, bias=c.output_bias)
        out = o_proj.join(finish(o_proj(out)), stream.x)
        return Stream(mark_product(constrain(out, BATCH, LENGTH, HIDDEN)), kept)

    def _attended(
        self,
        x: Array,
        past: Any,
        rotation: Rotation,
        kept: Mapping[int, Kept],
    ) -> tuple[Array, Array | None, Array, Array]:
        """Return queries, the gates of their outputs, and the keys and values that they attend to.

        Without gates, these are None.
        """
        c, gate = self.config, None
        if c.latent is not None:
            q, k, v = by_heads(latent_heads(c.latent, self.options, x, rotation))
            return (q, gate, *prepend_virtual(self, past, mark_product(k), mark_product(v)))
        q, *fresh = self._heads(x)
        if c.output_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        q, *fresh = by_heads((q, *fresh))
        q = rotation.queries(self._of_heads("q_norm", q))
        if c.keys_of is not None:
            return q, gate, kept[c.keys_of].keys, kept[c.keys_of].values
        return (q, gate, *self._keys(fresh, past, rotation))

    def _keys(
        self, projected: Sequence[Array], past: Any, rotation: Rotation
    ) -> tuple[Array, Array]:
        """Return the layer's own keys and values, with those of virtual positions."""
        c, (k, v) = self.config, projected
        k = rotation.keys(self._of_heads("k_norm", k))
        v = normalize(v, c.rms_norm_eps).astype(v.dtype) if c.value_norm else v
        return prepend_virtual(self, past, mark_product(k), mark_product(v))

    def _heads(self, x: Array) -> tuple[Array, ...]:
        """Return queries, keys and values `[batch, length, heads, d]`, or queries alone; a query is
        followed by the gate of its head, if there are gates.
        """
        c = self.config
        heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
        sizes = (c.head_dim * (1 + c.output_gate), c.head_dim, c.head_dim)
        if c.fused_qkv:
            widths = [n * c.head_dim for n in (heads, kv_heads, kv_heads)]
            joint = dense(sum(widths), "qkv_proj", self.options, bias=c.qkv_bias)(x)
            parts = tuple(jnp.split(joint, (widths[0], widths[0] + widths[1]), axis=-1))
        else:
            counts = {"q_proj": heads * (1 + c.output_gate), "k_proj": kv_heads, "v_proj": kv_heads}
            first, *others = (
                dense(counts[name] * c.head_dim, name, self.options, bias=c.qkv_bias)
                for name in c.projections
            )
            parts = first.together(x, *others)
            parts = parts if "v_proj" in c.projections else (*parts, *parts[1:])
        if c.qk_norm and c.wide_qk_norm:
            q, k, v = parts
            parts = self._norm("q_norm")(q), self._norm("k_norm")(k), v
        return tuple(
            y.reshape(*y.shape[:2], -1, size) for y, size in zip(parts, sizes, strict=False)
        )

    def _of_heads(self, name: str, x: Array) -> Array:
        """Return queries or keys, normalized by head if the family does."""
        c = self.config
        return self._norm(name)(x) if c.qk_norm and not c.wide_qk_norm else x

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
        stream: Stream,
        own: LayerInputs,
        rotation: Rotation,
        mask: Mask,
        places: Array | None,
        rows: TextRows,
    ) -> tuple[Stream, None]:
        """Run the layer.

        Args:
            stream: what the layer before returns.
            own: what only this layer gets.
            rotation: rotation of queries and keys; the arrays have a leading axis if `own.rope`
                selects one of several.
            mask: the attention mask.
            places: `[batch or 1, key]`, positions for the windows; None without windows.
            rows: padding and documents, for experts and recurrences.
        """
        c, options = self.config, self.options
        stream = replace(stream, x=mark_input(stream.x))
        rotation, mask = own.rotation or rotation, own.mask or mask
        if own.rope is not None:
            rotation = jax.tree.map(lambda tables: tables[own.rope], rotation)
        if own.window is not None and places is not None:
            queries = places[:, -stream.x.shape[1] :]
            apart = queries[:, None, :, None] - places[:, None, None, :]
            mask = mask.restrict((apart < own.window) | (own.window == 0))
        names = c.norms
        h = self._normalize(names.before_attention, stream.x)
        finish = partial(self._finish, names.after_attention)
        if c.delta_net is None:
            attention = Attention(c, options, name="self_attn")
            stream = attention(h, stream, finish, own, rotation, mask)
        else:
            net = GatedDeltaNet(
                c.delta_net,
                c.hidden_size,
                c.hidden_act,
                c.rms_norm_eps,
                options,
                name="linear_attn",
            )
            stream = replace(stream, x=net(h, stream.x, finish, own.cached, rows))
        h = self._normalize(names.before_mlp, stream.x)
        finish = partial(self._finish, names.after_mlp)
        if c.mixture is None:
            x = FeedForward(c, options, name="mlp")(h, stream.x, finish)
        else:
            experts = SparseFeedForward(c.mixture, c.hidden_act, options, name=c.mixture.module)
            x = experts(h, stream.x, finish, rows.text)
        if own.embedded is not None:
            x = add_layer_input(x, own.embedded, c.hidden_act, c.rms_norm_eps, options)
        if c.layer_scalar:
            factor = self.param("layer_scalar", nn.initializers.ones, (1,), jnp.float32)
            x = scaled(x, factor.astype(jnp.float32))
        return replace(stream, x=x), None

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
