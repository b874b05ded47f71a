"""Encoders that are built like BERT: RoBERTa, XLM-RoBERTa, CamemBERT, ELECTRA, DistilBERT.

Devlin et al. 2018 (arXiv:1810.04805), Liu et al. 2019 (arXiv:1907.11692), Conneau et al. 2019
(arXiv:1911.02116), Martin et al. 2019 (arXiv:1911.03894), Clark et al. 2020 (arXiv:2003.10555),
Sanh et al. 2019 (arXiv:1910.01108).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import Family, ModelOptions, Pretrained, option_problems, with_pooling
from jaxpeft.models.encoder_config import STYLES, TASKS, EncoderConfig, read_config
from jaxpeft.models.encoder_layers import BertBlock, DistilBertBlock, Embeddings, EncoderPart
from jaxpeft.models.layer_stack import run_layers
from jaxpeft.models.layers import (
    dense,
    dropout,
    head_dense,
    pool,
)
from jaxpeft.models.masks import Mask, Virtual, make_mask, positions

Array = jax.Array


class _Stack(EncoderPart):
    """The module with the layers: `encoder` in BERT, `transformer` in DistilBERT."""

    @nn.compact
    def __call__(self, x: Array, past: Array | None, mask: Mask) -> Array:
        c, options = self.config, self.options
        block = DistilBertBlock if c.style.layers == "transformer" else BertBlock
        fields = [{"config": c, "options": options}] * c.num_hidden_layers
        return run_layers(block, fields, "layer", options, x, past, mask)


class _Pooler(EncoderPart):
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
            if segment_ids is None:
                c.check_length(length, virtual.count)
            counted = positions(segment_ids, batch, length)
            where = _offset(c, input_ids, counted, segment_ids, by_token=not virtual.prompted)
        virtual.require_unpacked(segment_ids)
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


class TwoLayerHead(EncoderPart):
    """A classification head of two layers, with tanh between them in RoBERTa."""

    labels: int = 2

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Map `[batch, d]` to `[batch, labels]`, float32."""
        c = self.config
        x = dropout(self, c.classifier_dropout, x.astype(jnp.float32))
        x = ACTIVATIONS[c.head_act](head_dense(c.hidden_size, "dense")(x))
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
            x = ACTIVATIONS[c.head_act](head_dense(c.hidden_size, "pre_classifier")(x))
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
