"""Decoders: embedding, layers and head, composed of the parts that their `config.json` names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models import composite, rope
from jaxpeft.models.base import (
    Family,
    ModelOptions,
    Pretrained,
    option_problems,
    with_pooling,
)
from jaxpeft.models.decoder_config import DecoderConfig, read_config
from jaxpeft.models.decoder_families import DECODER_FAMILIES
from jaxpeft.models.decoder_layers import Block, LayerInputs, Rotation, Stream
from jaxpeft.models.kv_cache import Cache, sow_positions
from jaxpeft.models.layer_embeddings import embed_for_layers
from jaxpeft.models.layer_stack import run_layers, stacked_layers
from jaxpeft.models.layers import (
    RMSNorm,
    dense,
    dropout,
    head_dense,
    pool,
    scaled,
)
from jaxpeft.models.masks import Mask, TextRows, Virtual, make_mask, positions, runs
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, VOCAB, constrain

Array = jax.Array
TASKS = ("causal_lm", "sequence_classification", "token_classification", "encoder")


class DecoderBackbone(Pretrained):
    """Embedding, layers and final norm: the model of task `encoder`."""

    def setup(self) -> None:
        """Make the embedding, which a tied head shares."""
        self.embed_tokens = nn.Embed(
            self.config.vocab_size, self.config.hidden_size, dtype=self.options.dtype
        )

    def logits(self, x: Array) -> Array:
        """Return the logits of a tied head: `x E^T`."""
        return self.embed_tokens.attend(x)

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
        cache: Cache | None = None,
    ) -> Array:
        """Return the hidden states after the final norm, `[batch, length, d]`.

        `token_type_ids` are ignored. With a `cache`, the tokens follow those of earlier calls, and
        `position_ids` are their positions.
        """
        del token_type_ids
        c, options = self.config, self.options
        batch, length = input_ids.shape
        where = positions(segment_ids, batch, length) if position_ids is None else position_ids
        virtual = virtual if cache is None else virtual.after_prompt()
        rotated = virtual.positions(where)
        rotations = [
            _rotation(c, each, size, rotated)
            for each, size in zip(c.ropes, c.rope_sizes, strict=True)
        ]
        if cache is None:
            padding = None if options.right_padded else attention_mask
            rows = make_mask(padding, segment_ids, causal=True)
            masks, places = _masks(c, options, virtual, rows, segment_ids, length)
        else:
            mask, places = virtual.mask_with_cache(cache, where, attention_mask)
            masks = dict[int | None, Mask]([(None, mask)])
        sow_positions(self, virtual.key_positions(rotated, attention_mask))
        words = self._embed(input_ids)
        own = _layer_inputs(c, options, virtual, cache, rotations, masks)
        own = dataclasses.replace(own, embedded=_embedded(c, options, input_ids, words))
        x = virtual.prepend(words)
        x = x if c.input_scale == 1 else scaled(x, c.input_scale)
        stream: Any = run_layers(
            Block,
            [{"config": c.of_layer(i), "options": options} for i in range(c.num_hidden_layers)],
            "layers",
            options,
            Stream(constrain(x, BATCH, LENGTH, HIDDEN)),
            own,
            rotations[0] if own.rope is None else _stacked(rotations),
            next(iter(masks.values())),
            places,
            _text_rows(c, virtual, attention_mask, segment_ids),
            kinds=c.unequal_layers,
        )
        norm = RMSNorm(c.rms_norm_eps, options.dtype, c.norm_offset, name="norm")
        return norm(stream.x)[:, virtual.prompted :]

    def _embed(self, input_ids: Array) -> Array:
        """Return the word embeddings, `[batch, length, d]`."""
        x, scale = self.embed_tokens(input_ids), self.config.embedding_scale
        return x if scale == 1 else x * jnp.asarray(scale, x.dtype)


def _embedded(c: DecoderConfig, options: ModelOptions, ids: Array, words: Array) -> Any:
    """Return the embeddings of tokens for each layer, as in `LayerInputs`; None without any."""
    if c.layer_embedding is None:
        return None
    layers = c.num_hidden_layers
    return embed_for_layers(c.layer_embedding, layers, c.rms_norm_eps, options, ids, words)


def _rotation(c: DecoderConfig, of: rope.Rope, size: int, where: Array) -> Rotation:
    """Return the rotation of tokens at positions `[batch, length]`, for heads of a size."""
    cos, sin = rope.tables(of, size, c.max_position_embeddings, where)
    growth = None
    if c.query_growth is not None:
        beta, start = c.query_growth
        growth = 1 + beta * jnp.log1p(jnp.floor(where.astype(jnp.float32) / start))
        growth = growth[..., None, None]
    return Rotation(cos, sin, growth, of.interleaved)


def _stacked(rotations: list[Rotation]) -> Rotation:
    return jax.tree.map(lambda *tables: jnp.stack(tables), *rotations)


def _masks(
    c: DecoderConfig,
    options: ModelOptions,
    virtual: Virtual,
    rows: Mask,
    segment_ids: Array | None,
    length: int,
) -> tuple[dict[int | None, Mask], Array | None]:
    """Return the masks of a call without a cache.

    Args:
        c: the architecture.
        options: options of the model.
        virtual: the virtual positions.
        rows: the mask without windows.
        segment_ids: `[batch, length]`, or None.
        length: number of tokens.

    Returns:
        A mask for each window, and None. Or one mask and the positions from which each layer
        computes its window: in equal, scanned layers with several windows, and with virtual
        positions.
    """
    windows = sorted(set(c.windows or (0,)))
    if windows != [0] and (virtual.count or (_is_one_body(c, options) and len(windows) > 1)):
        mask = virtual.mask(rows, length).prepare(options.attention, length)
        return {None: mask}, virtual.places(segment_ids, length)
    masks: dict[int | None, Mask] = {}
    for window in windows:
        mask = virtual.mask(dataclasses.replace(rows, window=window), length)
        masks[window] = mask.prepare(options.attention, length)
    return masks, None


def _text_rows(
    c: DecoderConfig, virtual: Virtual, attention_mask: Array | None, segment_ids: Array | None
) -> TextRows:
    """Return the padding and the documents of a batch, as far as layers need them."""
    recurrent = any(c.of_layer(i).delta_net is not None for i in range(c.num_hidden_layers))
    text = virtual.text(attention_mask) if recurrent or c.mixture is not None else None
    return TextRows(text, runs(segment_ids) if recurrent else None)


def _is_one_body(c: DecoderConfig, options: ModelOptions) -> bool:
    """Return whether one program computes all layers, whatever their windows and rotations."""
    return options.scan_layers and not c.per_layer


def _layer_inputs(
    c: DecoderConfig,
    options: ModelOptions,
    virtual: Virtual,
    cache: Cache | None,
    rotations: list[Rotation],
    masks: Mapping[int | None, Mask],
) -> LayerInputs:
    """Return what the layers do not share, as in `run_layers`."""
    kinds, several = c.layer_kinds, len(rotations) > 1
    numbers = jnp.asarray([kind.window for kind in kinds], jnp.int32)
    window = numbers if c.windows and None in masks else None
    own = LayerInputs(_past(c, options, virtual.past), cache and cache.layers, window)
    if _is_one_body(c, options):
        ropes = jnp.asarray([kind.rope for kind in kinds], jnp.int32)
        return dataclasses.replace(own, rope=ropes if several else None)
    return dataclasses.replace(
        own,
        mask=[masks[kind.window] for kind in kinds] if len(masks) > 1 else None,
        rotation=[rotations[kind.rope] for kind in kinds] if several else None,
    )


def _past(c: DecoderConfig, options: ModelOptions, past: Array | None) -> Any:
    """Return the keys and values of virtual positions for each layer, as in `run_layers`.

    Layers with other heads than the widest take the first heads, and of these the first dimensions,
    as in PEFT.
    """
    if past is None or not c.per_layer:
        return past
    parts = past.reshape(*past.shape[:-1], -1, c.widest_head)

    def own(layers: range) -> Array:
        first = c.of_layer(layers[0])
        heads, size = first.num_key_value_heads, first.head_dim
        some = parts[layers.start : layers.stop : layers.step, ..., :heads, :size]
        flat = some.reshape(*some.shape[:-2], heads * size)
        return flat if len(layers) > 1 else flat[0]

    stacks = stacked_layers(c.num_hidden_layers, c.unequal_layers, options)
    return {name: own(layers) for name, layers in stacks.items()}


class DecoderWithHead(Pretrained):
    """A decoder with a language-model or classification head."""

    def setup(self) -> None:
        """Make the backbone and the head."""
        c, options = self.config, self.options
        self.model = DecoderBackbone(c, options)
        if options.task != "causal_lm":
            bias = c.classifier_bias and options.task == "token_classification"
            self.score = head_dense(options.num_labels or 0, None, bias=bias)
        elif not c.tie_word_embeddings:
            self.lm_head = dense(c.vocab_size, None, options, bias=False)

    def head(self, x: Array) -> Array:
        """Return the float32 logits `[..., vocab]` of a language model for hidden states."""
        c = self.config
        out = self.model.logits(x) if c.tie_word_embeddings else self.lm_head(x)
        out = out.astype(jnp.float32)
        out = out if c.logits_scale == 1 else out * c.logits_scale
        out = out if c.logits_cap is None else c.logits_cap * jnp.tanh(out / c.logits_cap)
        return constrain(out, BATCH, LENGTH, VOCAB) if out.ndim == 3 else out

    def __call__(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        virtual: Virtual = Virtual(),  # noqa: B008 - frozen
        hidden: bool = False,
        **inputs: Any,
    ) -> Array:
        """Return float32 logits, for every position or, for sequence classification, every row.

        With `hidden`, a language model returns the head's input `[batch, length, d]` instead.
        """
        c, options = self.config, self.options
        x = self.model(input_ids, attention_mask, virtual=virtual, **inputs)
        if options.task == "causal_lm":
            return x if hidden else self.head(x)
        if options.task == "token_classification":
            return self.score(dropout(self, c.classifier_dropout, x))
        if options.pooling == "last" and c.pad_token_id is not None:
            # as in transformers, which detects padding by the token
            text = input_ids != c.pad_token_id
            attention_mask = text if attention_mask is None else text & (attention_mask > 0)
        return self.score(pool(x, attention_mask, options.pooling))


def build(config: Mapping[str, Any], options: ModelOptions, where: str) -> Pretrained:
    """Build a decoder from its `config.json`.

    Raises:
        ConfigError: Settings are not supported; it lists all of them.
    """
    family = DECODER_FAMILIES[config["model_type"]]
    problems = option_problems(options, family.model_type, TASKS, ("last", "mean", "cls"))
    kind = DecoderBackbone if options.task == "encoder" else DecoderWithHead
    parsed = read_config(family, config, problems, where)
    return kind(parsed, with_pooling(options, parsed.own_pooling))


FAMILIES = tuple(
    Family(
        model_types=(model_type,),
        build=build,
        prefix="model",
        ignored=(r".*rotary_emb\.inv_freq", *composite.OTHERS, *family.ignored),
        renamed=composite.RENAMED,
        optional=(r"lm_head\..*",),
        embedding="embed_tokens.weight",
    )
    for model_type, family in DECODER_FAMILIES.items()
)
