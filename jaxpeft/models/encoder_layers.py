"""Embeddings and layers of BERT and its kind, and of DistilBERT."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.encoder_config import EncoderConfig
from jaxpeft.models.layers import (
    LayerNorm,
    dense,
    dropout,
    mark_input,
    mark_product,
    residual_dense,
)
from jaxpeft.models.masks import Mask, Virtual, prepend_virtual
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, constrain

Array = jax.Array


class EncoderPart(nn.Module):
    """A submodule that is built from the config and the options."""

    config: EncoderConfig
    options: ModelOptions

    def norm(self, name: str, x: Array) -> Array:
        """Apply a layer norm with this name."""
        return LayerNorm(self.config.layer_norm_eps, self.options.dtype, name=name)(x)

    def attention(
        self, x: Array, past: Array | None, mask: Mask, names: tuple[str, str, str]
    ) -> Array:
        """Project and attend, `[batch, length, d]` to the same, before the output projection."""
        c = self.config
        shape = (*x.shape[:2], c.num_attention_heads, c.hidden_size // c.num_attention_heads)
        first, *others = (dense(c.hidden_size, name, self.options) for name in names)
        q, k, v = by_heads(mark_product(y).reshape(shape) for y in first.together(x, *others))
        k, v = prepend_virtual(self, past, k, v)
        return attend(self, self.options.attention, q, k, v, mask, c.attention_dropout)


class Embeddings(EncoderPart):
    """Word, position and token-type embeddings, summed and normalized."""

    @nn.compact
    def __call__(
        self, input_ids: Array, token_type_ids: Array | None, position_ids: Array, virtual: Virtual
    ) -> Array:
        """Return `[batch, length, d]`, with the prompt, if any, in front with token type 0."""
        c = self.config

        def embed(count: int, name: str, ids: Array) -> Array:
            return nn.Embed(count, c.embedding_size, dtype=self.options.dtype, name=name)(ids)

        x = virtual.prepend(embed(c.vocab_size, "word_embeddings", input_ids))
        if c.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            types = jnp.pad(types, ((0, 0), (virtual.prompted, 0)))
            x = x + embed(c.type_vocab_size, "token_type_embeddings", types)
        x = x + embed(c.max_position_embeddings, "position_embeddings", position_ids)
        return constrain(
            dropout(self, c.hidden_dropout, self.norm("LayerNorm", x)), BATCH, LENGTH, HIDDEN
        )


class _SelfAttention(EncoderPart):
    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        return self.attention(x, past, mask, ("query", "key", "value"))


class Output(EncoderPart):
    """A projection back to the residual stream, with dropout, the sum and the norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        """Project `x [batch, length, n]`, and add it to the residual stream."""
        out = residual_dense(self.config.hidden_size, "dense", self.options)
        # a shared module, since an adapter may apply it twice
        norm = LayerNorm(self.config.layer_norm_eps, self.options.dtype, name="LayerNorm")
        joined = out.join(dropout(self, self.config.hidden_dropout, out(x)), residual, norm)
        return mark_product(constrain(joined, BATCH, LENGTH, HIDDEN))


class _Attention(EncoderPart):
    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        h = _SelfAttention(self.config, self.options, name="self")(x, past, mask)
        return Output(self.config, self.options, name="output")(h, x)


class Intermediate(EncoderPart):
    """The wide part of the feed-forward network."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, length, d]` to `[batch, length, intermediate_size]`."""
        wide = mark_product(
            constrain(
                dense(self.config.intermediate_size, "dense", self.options)(x), BATCH, LENGTH, MLP
            )
        )
        return ACTIVATIONS[self.config.hidden_act](wide)


class BertBlock(EncoderPart):
    """One layer of BERT or RoBERTa."""

    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> tuple[Array, None]:
        """Run the layer on `[batch, length, d]`."""
        x = mark_input(x)
        x = _Attention(self.config, self.options, name="attention")(x, past, mask)
        h = Intermediate(self.config, self.options, name="intermediate")(x)
        return Output(self.config, self.options, name="output")(h, x), None


class _DistilAttention(EncoderPart):
    @nn.compact
    def __call__(
        self, x: Array, past: Array | None, mask: Mask, norm: Callable[[Array], Array]
    ) -> Array:
        h = self.attention(x, past, mask, ("q_lin", "k_lin", "v_lin"))
        out = residual_dense(self.config.hidden_size, "out_lin", self.options)
        return mark_product(constrain(out.join(out(h), x, norm), BATCH, LENGTH, HIDDEN))


class _DistilFeedForward(EncoderPart):
    @nn.compact
    def __call__(self, x: Array, norm: Callable[[Array], Array]) -> Array:
        c = self.config
        wide = mark_product(
            constrain(dense(c.intermediate_size, "lin1", self.options)(x), BATCH, LENGTH, MLP)
        )
        out = residual_dense(c.hidden_size, "lin2", self.options)
        joined = out.join(
            dropout(self, c.hidden_dropout, out(ACTIVATIONS[c.hidden_act](wide))), x, norm
        )
        return constrain(joined, BATCH, LENGTH, HIDDEN)


class DistilBertBlock(EncoderPart):
    """One layer of DistilBERT."""

    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> tuple[Array, None]:
        """Run the layer on `[batch, length, d]`."""
        x = mark_input(x)
        c, options = self.config, self.options
        norms = (
            LayerNorm(c.layer_norm_eps, options.dtype, name=f"{name}_layer_norm")
            for name in ("sa", "output")
        )
        x = _DistilAttention(c, options, name="attention")(x, past, mask, next(norms))
        return _DistilFeedForward(c, options, name="ffn")(x, next(norms)), None
