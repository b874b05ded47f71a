"""Encoders that are built like BERT: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT.

Devlin et al. 2018 (arXiv:1810.04805), Liu et al. 2019 (arXiv:1907.11692), Conneau et al. 2019
(arXiv:1911.02116), Martin et al. 2019 (arXiv:1911.03894), Clark et al. 2020 (arXiv:2003.10555),
Sanh et al. 2019 (arXiv:1910.01108).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.errors import DataError
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import Family, ModelOptions, Pretrained, option_problems, with_pooling
from jaxpeft.models.encoder_config import STYLES, TASKS, EncoderConfig, read_config
from jaxpeft.models.layers import (
    LayerNorm,
    dense,
    dropout,
    head_dense,
    mark_input,
    mark_product,
    pool,
    residual_dense,
    run_layers,
)
from jaxpeft.models.masks import Mask, Virtual, make_mask, positions, prepend_virtual
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, constrain

Array = jax.Array


class _Part(nn.Module):
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


class Embeddings(_Part):
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


class _SelfAttention(_Part):
    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        return self.attention(x, past, mask, ("query", "key", "value"))


class _Output(_Part):
    """A projection back to the residual stream, with dropout, the sum and the norm."""

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        out = residual_dense(self.config.hidden_size, "dense", self.options)
        # a shared module, since an adapter may apply it twice
        norm = LayerNorm(self.config.layer_norm_eps, self.options.dtype, name="LayerNorm")
        joined = out.join(dropout(self, self.config.hidden_dropout, out(x)), residual, norm)
        return mark_product(constrain(joined, BATCH, LENGTH, HIDDEN))


class _Attention(_Part):
    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        h = _SelfAttention(self.config, self.options, name="self")(x, past, mask)
        return _Output(self.config, self.options, name="output")(h, x)


class _Intermediate(_Part):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        wide = mark_product(
            constrain(
                dense(self.config.intermediate_size, "dense", self.options)(x), BATCH, LENGTH, MLP
            )
        )
        return ACTIVATIONS[self.config.hidden_act](wide)


class BertBlock(_Part):
    """One layer of BERT or RoBERTa."""

    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> tuple[Array, None]:
        """Run the layer on `[batch, length, d]`."""
        x = mark_input(x)
        x = _Attention(self.config, self.options, name="attention")(x, past, mask)
        h = _Intermediate(self.config, self.options, name="intermediate")(x)
        return _Output(self.config, self.options, name="output")(h, x), None


class _DistilAttention(_Part):
    @nn.compact
    def __call__(
        self, x: Array, past: Array | None, mask: Mask, norm: Callable[[Array], Array]
    ) -> Array:
        h = self.attention(x, past, mask, ("q_lin", "k_lin", "v_lin"))
        out = residual_dense(self.config.hidden_size, "out_lin", self.options)
        return mark_product(constrain(out.join(out(h), x, norm), BATCH, LENGTH, HIDDEN))


class _DistilFeedForward(_Part):
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


class DistilBertBlock(_Part):
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


class _Stack(_Part):
    """The module with the layers: `encoder` in BERT, `transformer` in DistilBERT."""

    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        c, options = self.config, self.options
        block = DistilBertBlock if c.style.layers == "transformer" else BertBlock
        fields = {"config": c, "options": options}
        return run_layers(block, fields, c.num_hidden_layers, "layer", options, x, past, mask)


class _Pooler(_Part):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return jnp.tanh(dense(self.config.hidden_size, "dense", self.options)(x[:, 0]))


class EncoderBackbone(Pretrained):
    """Embeddings and layers: the model of task `encoder`.

    Attributes:
        with_pooler: whether to return the pooler's vector instead of the hidden states.
        with_prompt: whether to include the prompt's hidden states in front of the tokens'.
    """

    with_pooler: bool = False
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
        """Return hidden states `[batch, length, d]`, or the pooler's vector `[batch, d]`.

        Raises:
            DataError: Rows are longer than the position table, or a prompt is used with packed
                rows.
        """
        c, options = self.config, self.options
        batch, length = input_ids.shape
        where = position_ids
        if where is None:
            _check_length(c, length, virtual.count, segment_ids)
            counted = positions(segment_ids, batch, length)
            where = _offset(c, input_ids, counted, segment_ids, by_token=not virtual.prompted)
        if virtual.prompted and segment_ids is not None:
            raise DataError(
                "segment_ids: a prompt attends to all tokens of a row, so rows cannot be packed;"
                " disable packing"
            )
        where = _shift_positions(c, virtual, where)
        x = Embeddings(c, options, name="embeddings")(input_ids, token_type_ids, where, virtual)
        if c.style.projection and c.embedding_size != c.hidden_size:
            x = dense(c.hidden_size, c.style.projection, options)(x)
        mask = virtual.mask(make_mask(attention_mask, segment_ids, causal=False), length).prepare(
            options.attention, length
        )
        x = _Stack(c, options, name=c.style.layers)(x, virtual.past, mask)
        if self.with_pooler:
            return _Pooler(c, options, name="pooler")(x)
        return x if self.with_prompt else x[:, virtual.prompted :]


def _shift_positions(c: EncoderConfig, virtual: Virtual, where: Array) -> Array:
    """Return the positions of prompt and tokens.

    RoBERTa's start after that of pad tokens, which virtual tokens do not shift.
    """
    shifted = virtual.positions(where)
    if not c.style.offset or not virtual.count:
        return shifted
    prompt, tokens = (
        shifted[:, : virtual.prompted] + c.first_position,
        shifted[:, virtual.prompted :],
    )
    return jnp.concatenate([prompt, jnp.where(where == c.pad_token_id, where, tokens)], axis=1)


def _check_length(c: EncoderConfig, length: int, virtual: int, segment_ids: Array | None) -> None:
    """Raise an error for rows beyond the position table, for which the lookup would return NaN."""
    most = c.max_position_embeddings - c.first_position
    if length + virtual > most and segment_ids is None:
        more = f" and {virtual} virtual ones" if virtual else ""
        raise DataError(
            f"input_ids: a row has {length} tokens{more}, but the {c.kind} model supports at most"
            f" {most}; truncate the texts"
        )


def _offset(
    c: EncoderConfig, input_ids: Array, counted: Array, segment_ids: Array | None, *, by_token: bool
) -> Array:
    """Return RoBERTa's positions: tokens start at `pad_token_id + 1`, pad tokens are at
    `pad_token_id`.

    After a prompt, pad tokens count like others, as in `transformers`, which then gets embeddings
    instead of tokens.
    """
    if not c.style.offset:
        return counted
    if not by_token:
        return counted + c.first_position
    real = (input_ids != c.pad_token_id).astype(jnp.int32)
    if segment_ids is not None:
        return (counted + 1) * real + c.pad_token_id
    return jnp.cumsum(real, axis=1) * real + c.pad_token_id


class TwoLayerHead(_Part):
    """A classification head of two layers, with tanh between them in RoBERTa."""

    labels: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, d]` to `[batch, labels]`, float32."""
        c = self.config
        x = dropout(self, c.classifier_dropout, x.astype(jnp.float32))
        x = ACTIVATIONS[c.style.head_act](head_dense(c.hidden_size, "dense")(x))
        return head_dense(self.labels, "out_proj")(dropout(self, c.classifier_dropout, x))


class EncoderWithHead(Pretrained):
    """An encoder with a classification head."""

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
        how = options.pooling
        sequence = options.task == "sequence_classification"
        pooler = sequence and how == "pooler"
        first = sequence and how == "cls"
        backbone = EncoderBackbone(
            c, options, with_pooler=pooler, with_prompt=first, name=c.style.backbone
        )
        x = backbone(input_ids, attention_mask, virtual=virtual, **inputs)
        if sequence and not pooler:
            x = pool(x, attention_mask, how)
        labels = options.num_labels or 0
        if sequence and c.style.head == "two_layers":
            return TwoLayerHead(c, options, labels, name="classifier")(x)
        if sequence and c.style.head == "pre_classifier":
            x = jax.nn.relu(head_dense(c.hidden_size, "pre_classifier")(x))
        return head_dense(labels, "classifier")(dropout(self, c.classifier_dropout, x))


def build(config: Mapping[str, Any], options: ModelOptions, where: str) -> Pretrained:
    """Build an encoder from its `config.json`.

    Raises:
        ConfigError: Settings are not supported; it lists all of them.
    """
    kind = config["model_type"]
    problems = option_problems(options, kind, TASKS, STYLES[kind].poolings)
    parsed = read_config(config, options.task, problems, where)
    return (EncoderBackbone if options.task == "encoder" else EncoderWithHead)(
        parsed, with_pooling(options, parsed.own_pooling)
    )


_PRETRAINING = (
    r"cls\..*",
    r"qa_outputs\..*",
    r"lm_head\..*",
    r"vocab_\w+\..*",
    r"(discriminator|generator)_\w+\..*",
    r".*\.position_ids",
    r"position_ids",
)
_POOLER = (r"pooler\..*",)
_RENAMED = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))

BERT = Family(
    ("bert",), build, "bert", _PRETRAINING, _POOLER, _RENAMED, own_pooler="pooler.dense.weight"
)
ROBERTA = Family(
    ("roberta", "xlm-roberta", "camembert"), build, "roberta", _PRETRAINING, _POOLER, _RENAMED
)
ELECTRA = Family(("electra",), build, "electra", _PRETRAINING, (), _RENAMED)
_DISTILBERT_FIELDS = {"num_hidden_layers": "n_layers", "hidden_size": "dim"}
DISTILBERT = Family(
    ("distilbert",), build, "distilbert", _PRETRAINING, (), _RENAMED, fields=_DISTILBERT_FIELDS
)
FAMILIES = (BERT, ROBERTA, ELECTRA, DISTILBERT)
