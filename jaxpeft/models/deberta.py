"""DeBERTa-v2 and v3: BERT with disentangled attention, and in v2's larger models a convolution.

He et al. 2020 (arXiv:2006.03654); He et al. 2021, "DeBERTaV3" (arXiv:2111.09543), whose encoder has
v2's architecture.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxpeft.models import disentangled
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import Family, ModelOptions, Pretrained, option_problems, with_pooling
from jaxpeft.models.deberta_config import DebertaConfig, read_config
from jaxpeft.models.encoder_config import STYLES, TASKS
from jaxpeft.models.encoder_layers import Intermediate, Output
from jaxpeft.models.layer_stack import run_layers
from jaxpeft.models.layers import (
    LayerNorm,
    dense,
    dropout,
    head_dense,
    mark_input,
    mark_product,
    pool,
)
from jaxpeft.models.masks import Mask, Virtual, make_mask, positions
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, constrain

Array = jax.Array


class _Part(nn.Module):
    """A submodule that is built from the config and the options."""

    config: DebertaConfig
    options: ModelOptions

    def norm(self, name: str, x: Array) -> Array:
        """Apply a layer norm with this name."""
        return LayerNorm(self.config.layer_norm_eps, self.options.dtype, name=name)(x)


class _Embeddings(_Part):
    """Word embeddings, and position and token-type embeddings if the config has them."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        token_type_ids: Array | None,
        position_ids: Array,
        text: Array | None,
        virtual: Virtual,
    ) -> Array:
        """Return `[batch, length, d]`, zero at padding."""
        c = self.config

        def embed(count: int, name: str, ids: Array) -> Array:
            return nn.Embed(count, c.embedding_size, dtype=self.options.dtype, name=name)(ids)

        x = virtual.prepend(embed(c.vocab_size, "word_embeddings", input_ids))
        if c.absolute:
            x = x + embed(c.max_position_embeddings, "position_embeddings", position_ids)
        if c.type_vocab_size:
            types = jnp.zeros_like(input_ids) if token_type_ids is None else token_type_ids
            types = jnp.pad(types, ((0, 0), (virtual.prompted, 0)))
            x = x + embed(c.type_vocab_size, "token_type_embeddings", types)
        if c.embedding_size != c.hidden_size:
            x = dense(c.hidden_size, "embed_proj", self.options, bias=False)(x)
        x = _blank(self.norm("LayerNorm", x), text)
        return constrain(dropout(self, c.hidden_dropout, x), BATCH, LENGTH, HIDDEN)


def _blank(x: Array, text: Array | None) -> Array:
    """Set `x [batch, length, d]` to zero where `text [batch, length]` is false."""
    return x if text is None else jnp.where(text[..., None], x, jnp.zeros((), x.dtype))


class _SelfAttention(_Part):
    @nn.compact
    def __call__(self, x: Array, table: Array | None, mask: Mask) -> Array:
        c, options = self.config, self.options
        size = c.hidden_size // c.num_attention_heads
        query, key, value = (
            dense(c.hidden_size, f"{name}_proj", options) for name in ("query", "key", "value")
        )

        def heads(y: Array) -> Array:
            return mark_product(y).reshape(*y.shape[:2], c.num_attention_heads, size)

        q, k, v = by_heads(heads(y) for y in query.together(x, key, value))
        scale = (1 + len(c.terms)) ** -0.5
        q, bias = q * jnp.asarray(scale, q.dtype), None
        if table is not None:
            table = dropout(self, c.hidden_dropout, table)[None]
            rows = disentangled.rows_of_distances(x.shape[1], c.span, c.buckets, c.farthest)
            if "c2p" in c.terms:
                to = key if c.shared else dense(c.hidden_size, "pos_key_proj", options)
                bias = disentangled.content_to_position(q, heads(to(table)), rows)
            if "p2c" in c.terms:
                to = query if c.shared else dense(c.hidden_size, "pos_query_proj", options)
                scores = scale * disentangled.position_to_content(k, heads(to(table)), rows)
                bias = scores if bias is None else bias + scores
            bias = None if bias is None else bias * size**-0.5
        return attend(self, options.attention, q, k, v, mask, c.attention_dropout, bias=bias)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: Array, table: Array | None, mask: Mask) -> Array:
        h = _SelfAttention(self.config, self.options, name="self")(x, table, mask)
        return Output(self.config, self.options, name="output")(h, x)


@struct.dataclass
class _Convolved:
    """The convolution's part of the first layer's output.

    Attributes:
        x: `[batch, length, d]`, what is added.
        scale: scale of the norm after the sum.
        bias: its bias.
        text: `[batch, length]`, false for padding; or None.
    """

    x: Array
    scale: Array
    bias: Array
    text: Array | None


class DebertaBlock(_Part):
    """One layer."""

    @nn.compact
    def __call__(
        self,
        x: Array,
        first: Array | None,
        table: Array | None,
        mask: Mask,
        convolved: _Convolved | None,
    ) -> tuple[Array, None]:
        """Run the layer on `[batch, length, d]`; the convolution is added if `first` is true."""
        c, options, x = self.config, self.options, mark_input(x)
        x = _Attention(c, options, name="attention")(x, table, mask)
        h = Intermediate(c, options, name="intermediate")(x)
        x = Output(c, options, name="output")(h, x)
        if first is not None and convolved is not None:
            leaves = {"scale": convolved.scale, "bias": convolved.bias}
            norm = partial(LayerNorm(c.layer_norm_eps, options.dtype).apply, {"params": leaves})
            joined: Any = norm(x + convolved.x)
            x = jnp.where(first, _blank(joined, convolved.text), x)
        return x, None


class _NormLeaves(nn.Module):
    """The leaves of a layer norm that another scope applies."""

    width: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        ones, zeros = nn.initializers.ones, nn.initializers.zeros
        scale = self.param("scale", ones, (self.width,), jnp.float32)
        return scale, self.param("bias", zeros, (self.width,), jnp.float32)


class _Taps(_Part):
    """A grouped convolution over positions, as a sum of products with shifted inputs."""

    @nn.compact
    def __call__(self, x: Array, segments: Array | None) -> Array:
        c, conv, dtype = self.config, self.config.conv, self.options.dtype
        if conv is None:
            return x
        width = c.hidden_size // conv.groups
        init = nn.initializers.lecun_normal()
        kernel = self.param("kernel", init, (conv.size, width, c.hidden_size), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c.hidden_size,), jnp.float32)
        kernel = kernel.astype(dtype).reshape(conv.size, width, conv.groups, width)
        batch, length = x.shape[:2]
        ids = jnp.zeros((batch, length), jnp.int32) if segments is None else segments
        index, out = np.arange(length), bias.astype(dtype)
        for tap in range(conv.size):
            at = index + tap - conv.size // 2
            inside, at = (at >= 0) & (at < length), at.clip(0, length - 1)
            seen = (ids[:, at] == ids) & inside
            part = _blank(x[:, at], seen).reshape(batch, length, conv.groups, width)
            out = out + jnp.einsum("blgi,igo->blgo", part, kernel[tap]).reshape(x.shape)
        return out


class _Convolution(_Part):
    @nn.compact
    def __call__(self, x: Array, text: Array | None, segments: Array | None) -> _Convolved:
        c = self.config
        out = _blank(_Taps(c, self.options, name="conv")(x, segments), text)
        act = ACTIVATIONS[c.conv.act if c.conv else "linear"]
        scale, bias = _NormLeaves(c.hidden_size, name="LayerNorm")()
        return _Convolved(act(dropout(self, c.hidden_dropout, out)), scale, bias, text)


class _Encoder(_Part):
    """The layers, and what they share."""

    @nn.compact
    def __call__(self, x: Array, mask: Mask, text: Array | None, segments: Array | None) -> Array:
        c, options = self.config, self.options
        table, convolved, first = None, None, None
        if c.relative and c.terms:
            rows = nn.Embed(2 * c.span, c.hidden_size, dtype=options.dtype, name="rel_embeddings")
            table = rows(jnp.arange(2 * c.span))
            table = self.norm("LayerNorm", table) if c.normed else table
        if c.conv is not None:
            convolved = _Convolution(c, options, name="conv")(x, text, segments)
            first = jnp.arange(c.num_hidden_layers) == 0
        fields = [{"config": c, "options": options}] * c.num_hidden_layers
        shared = table, mask, convolved
        return run_layers(DebertaBlock, fields, "layer", options, x, first, *shared)


class DebertaBackbone(Pretrained):
    """Embeddings and layers: the model of task `encoder`.

    Attributes:
        with_prompt: whether to include the prompt's hidden states in front of the tokens'.
    """

    with_prompt: bool = False

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        token_type_ids: Array | None = None,
        position_ids: Array | None = None,
        segment_ids: Array | None = None,
        virtual: Virtual = Virtual(),  # noqa: B008 - frozen
    ) -> Array:
        """Return hidden states `[batch, length, d]`.

        Raises:
            DataError: Rows are longer than the position table, or a prompt is used with packed
                rows.
        """
        c, options = self.config, self.options
        batch, length = input_ids.shape
        virtual.require_unpacked(segment_ids)
        if c.absolute and position_ids is None and segment_ids is None:
            c.check_length(length, virtual.count)
        where = positions(segment_ids, batch, length) if position_ids is None else position_ids
        text = None
        if attention_mask is not None:
            width = ((0, 0), (virtual.prompted, 0))
            text = jnp.pad(attention_mask.astype(bool), width, constant_values=True)
        where = virtual.positions(where)
        embeddings = _Embeddings(c, options, name="embeddings")
        x = embeddings(input_ids, token_type_ids, where, text, virtual)
        mask = virtual.mask(make_mask(attention_mask, segment_ids, causal=False), length)
        if text is not None:  # padding attends to nothing, as in the original
            mask = mask.restrict(text[:, None, :, None])
        mask = mask.prepare("xla", x.shape[1])
        x = _Encoder(c, options, name="encoder")(x, mask, text, segment_ids)
        return x if self.with_prompt else x[:, virtual.prompted :]


class ContextPooler(_Part):
    """The head's layer before the last one."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, d]` to the same, float32."""
        c = self.config
        x = dropout(self, c.pooler_dropout, x.astype(jnp.float32))
        return ACTIVATIONS[c.pooler_act](head_dense(c.hidden_size, "dense")(x))


class DebertaWithHead(Pretrained):
    """A DeBERTa with a classification head."""

    @nn.compact
    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        virtual: Virtual = Virtual(),  # noqa: B008 - frozen
        **inputs: Any,
    ) -> Array:
        """Return float32 logits `[batch, labels]`, or for every token for token classification.

        The pooling `cls` uses the first position, which may belong to a prompt.
        """
        c, options = self.config, self.options
        sequence = options.task == "sequence_classification"
        first = sequence and options.pooling == "cls"
        backbone = DebertaBackbone(c, options, with_prompt=first, name=c.style.backbone)
        x = backbone(input_ids, attention_mask, virtual=virtual, **inputs)
        if sequence:
            x = pool(x, attention_mask, options.pooling)
            x = ContextPooler(c, options, name="pooler")(x)
        return head_dense(options.num_labels or 0, "classifier")(
            dropout(self, c.classifier_dropout, x)
        )


def build(config: Mapping[str, Any], options: ModelOptions, where: str) -> Pretrained:
    """Build a DeBERTa from its `config.json`.

    Raises:
        ConfigError: Settings are not supported; it lists all of them.
    """
    kind = config["model_type"]
    problems = option_problems(options, kind, TASKS, STYLES[kind].poolings)
    parsed = read_config(config, options.task, problems, where)
    return (DebertaBackbone if options.task == "encoder" else DebertaWithHead)(
        parsed, with_pooling(options, parsed.own_pooling)
    )


FAMILY = Family(
    ("deberta-v2",),
    build,
    "deberta",
    ignored=(r"(lm|mask)_predictions\..*", r"cls\..*", r"(.*\.)?position_ids"),
    optional=(
        r"embeddings\.position_embeddings\..*",
        r"encoder\.(rel_embeddings|LayerNorm)\..*",
    ),
    pretrained_heads=("pooler",),
)
