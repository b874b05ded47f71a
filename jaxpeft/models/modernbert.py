"""ModernBERT: a pre-norm encoder with rotary positions, local windows and gated feed-forward.

    x = x + Wo attend(rotate(Wqkv norm(x))),    x = x + Wo (act(a) * b),   [a, b] = Wi norm(x)

Most layers attend within a window that is symmetric around the query, with rotary frequencies of
their own; every n-th layer attends to all tokens. The first layer has no norm before attention,
since the embeddings are normalized: the layers are unequal, and therefore not scanned.

Warner et al. 2024, "Smarter, Better, Faster, Longer: A Modern Bidirectional Encoder" (ModernBERT),
section 2.1 (arXiv:2412.13663).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models import rope
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import Family, ModelOptions, Pretrained, option_problems, with_pooling
from jaxpeft.models.encoder_config import TASKS
from jaxpeft.models.layer_stack import run_layers
from jaxpeft.models.layers import (
    LayerNorm,
    dense,
    dropout,
    head_dense,
    mark_input,
    mark_product,
    pool,
    residual_dense,
)
from jaxpeft.models.masks import Mask, Virtual, make_mask, positions
from jaxpeft.models.modernbert_config import POOLINGS, SLIDING, ModernBertConfig, read_config
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, constrain

Array = jax.Array


class _Part(nn.Module):
    """A submodule that is built from the config and the options."""

    config: ModernBertConfig
    options: ModelOptions

    def norm(self, name: str, x: Array) -> Array:
        """Apply a layer norm with this name."""
        c = self.config
        return LayerNorm(c.norm_eps, self.options.dtype, c.norm_bias, name=name)(x)


class _Embeddings(_Part):
    @nn.compact
    def __call__(self, input_ids: Array, virtual: Virtual) -> Array:
        c, dtype = self.config, self.options.dtype
        table = nn.Embed(c.vocab_size, c.hidden_size, dtype=dtype, name="tok_embeddings")
        x = self.norm("norm", virtual.prepend(table(input_ids)))
        return constrain(dropout(self, c.embedding_dropout, x), BATCH, LENGTH, HIDDEN)


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: Array, residual: Array, mask: Mask, cos: Array, sin: Array) -> Array:
        c, options = self.config, self.options
        joint = mark_product(dense(3 * c.hidden_size, "Wqkv", options, bias=c.attention_bias)(x))
        joint = joint.reshape(*x.shape[:2], 3, c.num_attention_heads, c.head_dim)
        q, k, v = by_heads(joint[:, :, i] for i in range(3))
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        h = attend(self, options.attention, q, k, v, mask, c.attention_dropout)
        out = residual_dense(c.hidden_size, "Wo", options, bias=c.attention_bias)
        h = dropout(self, c.attention_dropout, out(h))
        return mark_product(constrain(out.join(h, residual), BATCH, LENGTH, HIDDEN))


class _FeedForward(_Part):
    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        c, options = self.config, self.options
        wide = dense(2 * c.intermediate_size, "Wi", options, bias=c.mlp_bias)(x)
        act, gate = jnp.split(mark_product(wide), 2, axis=-1)
        h = constrain(ACTIVATIONS[c.hidden_act](act) * gate, BATCH, LENGTH, MLP)
        out = residual_dense(c.hidden_size, "Wo", options, bias=c.mlp_bias)
        h = out(dropout(self, c.mlp_dropout, h))
        return constrain(out.join(h, residual), BATCH, LENGTH, HIDDEN)


class ModernBertBlock(_Part):
    """One layer.

    Attributes:
        normed: whether attention has a norm before it.
    """

    normed: bool = True

    @nn.compact
    def __call__(self, x: Array, per_layer: tuple[Mask, Array, Array]) -> tuple[Array, None]:
        """Run the layer.

        Args:
            x: `[batch, length, d]`.
            per_layer: the mask; cosines and sines.
        """
        (mask, cos, sin), x = per_layer, mark_input(x)
        h = self.norm("attn_norm", x) if self.normed else x
        x = _Attention(self.config, self.options, name="attn")(h, x, mask, cos, sin)
        h = self.norm("mlp_norm", x)
        return _FeedForward(self.config, self.options, name="mlp")(h, x), None


class ModernBertBackbone(Pretrained):
    """Embeddings, layers and final norm: the model of task `encoder`.

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
        """Return hidden states `[batch, length, d]`; `token_type_ids` are ignored.

        Raises:
            DataError: A prompt is used with packed rows.
        """
        del token_type_ids
        c, options = self.config, self.options
        batch, length = input_ids.shape
        virtual.require_unpacked(segment_ids)
        where = positions(segment_ids, batch, length) if position_ids is None else position_ids
        where = virtual.positions(where)
        x = _Embeddings(c, options, name="embeddings")(input_ids, virtual)
        tables = {
            name: rope.tables(one, c.head_dim, c.max_position_embeddings, where)
            for name, one in c.ropes
        }
        mask = virtual.mask(make_mask(attention_mask, segment_ids, causal=False), length)
        index = jnp.arange(x.shape[1])
        near = jnp.abs(index[:, None] - index[None, :]) <= c.reach
        local = mask.restrict(near[None, None]).prepare("xla", x.shape[1])
        mask = mask.prepare(options.attention, x.shape[1])
        per_layer = [(local if name == SLIDING else mask, *tables[name]) for name in c.layer_types]
        kinds = [(i > 0, name) for i, name in enumerate(c.layer_types)]
        fields = [{"config": c, "options": options, "normed": normed} for normed, _ in kinds]
        x = run_layers(ModernBertBlock, fields, "layers", options, x, per_layer, kinds=kinds)
        x = LayerNorm(c.norm_eps, options.dtype, c.norm_bias, name="final_norm")(x)
        return x if self.with_prompt else x[:, virtual.prompted :]


class PredictionHead(_Part):
    """The head's layer before the last one, which pretraining has trained."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[..., d]` to the same, float32."""
        c = self.config
        x = head_dense(c.hidden_size, "dense", bias=c.classifier_bias)(x.astype(jnp.float32))
        norm = LayerNorm(c.norm_eps, jnp.float32, c.norm_bias, name="norm")
        return norm(ACTIVATIONS[c.head_act](x))


class ModernBertWithHead(Pretrained):
    """A ModernBERT with a classification head."""

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

        Poolings include a prompt, as in PEFT.
        """
        c, options = self.config, self.options
        sequence = options.task == "sequence_classification"
        backbone = ModernBertBackbone(c, options, with_prompt=sequence, name="model")
        x = backbone(input_ids, attention_mask, virtual=virtual, **inputs)
        if sequence:
            if attention_mask is not None:
                width = ((0, 0), (virtual.prompted, 0))
                attention_mask = jnp.pad(attention_mask, width, constant_values=1)
            x = pool(x, attention_mask, options.pooling)
        x = dropout(self, c.classifier_dropout, PredictionHead(c, options, name="head")(x))
        return head_dense(options.num_labels or 0, "classifier")(x)


def build(config: Mapping[str, Any], options: ModelOptions, where: str) -> Pretrained:
    """Build a ModernBERT from its `config.json`.

    Raises:
        ConfigError: Settings are not supported; it lists all of them.
    """
    problems = option_problems(options, config["model_type"], TASKS, POOLINGS)
    parsed = read_config(config, problems, where)
    return (ModernBertBackbone if options.task == "encoder" else ModernBertWithHead)(
        parsed, with_pooling(options, parsed.own_pooling)
    )


FAMILY = Family(
    ("modernbert",),
    build,
    "model",
    ignored=(r"decoder\..*",),
    embedding="tok_embeddings.weight",
    pretrained_heads=("head",),
)
