"""The decoder family: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3, in one implementation.

Touvron et al. 2023 (arXiv:2302.13971), Jiang et al. 2023 (arXiv:2310.06825), Qwen team 2024 and
2025 (arXiv:2407.10671, arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.errors import show
from jaxpeft.models import rope
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention import attend, by_heads
from jaxpeft.models.base import (
    MOST_HEADS,
    MOST_LAYERS,
    ConfigReader,
    Family,
    ModelOptions,
    Pretrained,
    option_problems,
    with_pooling,
)
from jaxpeft.models.kv_cache import Cache, sow_positions
from jaxpeft.models.layers import (
    RMSNorm,
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
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, VOCAB, constrain

Array = jax.Array


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture, with the names of `config.json` except for `windows`.

    Attributes:
        classifier_bias: whether the token classification head has a bias.
        windows: window size of each layer, including the query itself; 0 for no limit. None if all
            are 0.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_act: str
    max_position_embeddings: int
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_dropout: float
    classifier_dropout: float
    classifier_bias: bool
    rope: rope.Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...] | None
    pad_token_id: int | None

    @property
    def own_pooling(self) -> str:
        """The pooling of the sequence classifier in `transformers`."""
        return "last"


_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "token_classification_bias": True,
    "rope_theta": 10000.0,
    "max_window_layers": 28,
}
_OWN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
}


def read_config(
    config: Mapping[str, Any], problems: Sequence[str] = (), where: str = "config.json"
) -> DecoderConfig:
    """Read a decoder's `config.json`.

    Args:
        config: its content.
        problems: known problems, which are raised with the rest.
        where: path of the file, for messages.

    Raises:
        ConfigError: Switches are missing or not supported; it lists all of them.
    """
    kind = config["model_type"]
    reader = ConfigReader(config, {**_DEFAULTS, **_OWN_DEFAULTS.get(kind, {})}, problems, where)
    reader.check_quantization()
    layers = reader.integer("num_hidden_layers", most=MOST_LAYERS)
    heads, kv_heads, head_dim = _heads(reader)
    bias = reader.flag("attention_bias") and kind in ("llama", "qwen3")
    parsed = DecoderConfig(
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act=reader.one_of("hidden_act", ACTIVATIONS),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        tie_word_embeddings=reader.flag("tie_word_embeddings"),
        attention_dropout=reader.rate("attention_dropout"),
        classifier_dropout=reader.rate("classifier_dropout", reader.rate("hidden_dropout", 0.1)),
        classifier_bias=reader.flag("token_classification_bias"),
        rope=rope.read(reader),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=reader.flag("mlp_bias") and kind == "llama",
        qk_norm=kind == "qwen3",
        windows=_windows(reader, kind, layers),
        pad_token_id=(
            None if reader.get("pad_token_id") is None else reader.integer("pad_token_id", least=0)
        ),
    )
    reader.finish()
    return parsed


def _heads(reader: ConfigReader) -> tuple[int, int, int]:
    """Return the numbers of query and key heads, and the head size."""
    hidden = reader.get("hidden_size")
    heads = reader.integer("num_attention_heads", most=MOST_HEADS)
    grouped = reader.get("num_key_value_heads") is not None
    kv_heads = reader.integer("num_key_value_heads", most=MOST_HEADS) if grouped else heads
    if heads == reader.get("num_attention_heads") and heads % kv_heads:
        reader.problems.append(
            f"num_key_value_heads: {kv_heads} does not divide num_attention_heads {heads}"
        )
    if reader.get("head_dim") is not None:
        size = reader.integer("head_dim", most=MOST_HEADS)
    else:
        size = max(1, hidden // heads) if isinstance(hidden, int) else 2
        if isinstance(hidden, int) and hidden % heads:
            reader.problems.append(
                f"num_attention_heads: {heads} does not divide hidden_size {hidden}"
            )
    if size % 2:
        reader.problems.append(f"head_dim: must be even for rotary embeddings, is {size}")
    return heads, kv_heads, size


def _windows(reader: ConfigReader, kind: str, layers: int) -> tuple[int, ...] | None:
    named = reader.get("layer_types") if kind != "llama" else None
    used = kind == "mistral" or (kind != "llama" and reader.flag("use_sliding_window"))
    window = (
        reader.integer("sliding_window") if used and reader.get("sliding_window") is not None else 0
    )
    if named is not None:
        sliding = _named_windows(reader, named, layers, window)
    elif kind == "mistral" or not window:
        sliding = [True] * layers
    else:
        upper = reader.integer("max_window_layers", least=0)
        sliding = [i >= upper for i in range(layers)]
    return tuple(window if on else 0 for on in sliding) if window and any(sliding) else None


def _named_windows(reader: ConfigReader, named: Any, layers: int, window: int) -> list[bool]:
    kinds = ("full_attention", "sliding_attention")
    if (
        not isinstance(named, list)
        or len(named) != layers
        or any(name not in kinds for name in named)
    ):
        reader.problems.append(
            f"layer_types: {show(named)} is not supported (supported: {' or '.join(kinds)},"
            f" {layers} times)"
        )
        return [False] * layers
    if kinds[1] in named and not window:
        reader.problems.append(
            f"layer_types: {kinds[1]} needs use_sliding_window true and sliding_window a number"
        )
    return [name == kinds[1] for name in named]


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        residual: Array,
        past: Array | None,
        cached: tuple[Array, Array] | None,
        cos: Array,
        sin: Array,
        mask: Mask,
    ) -> Array:
        """Attend, and add the result to the residual stream.

        Args:
            x: `[batch, length, d]`.
            residual: `x` before the norm.
            past: keys and values of virtual positions, see `Virtual`.
            cached: keys and values of earlier tokens, see `Cache`.
            cos: cosines of the rotation angles.
            sin: sines of the rotation angles.
            mask: the attention mask.
        """
        c, batch, length = self.config, *x.shape[:2]
        heads = {
            "q_proj": c.num_attention_heads,
            "k_proj": c.num_key_value_heads,
            "v_proj": c.num_key_value_heads,
        }
        first, *others = (
            dense(n * c.head_dim, name, self.options, bias=c.qkv_bias) for name, n in heads.items()
        )
        q, k, v = by_heads(
            y.reshape(batch, length, -1, c.head_dim) for y in first.together(x, *others)
        )
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.options.dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.options.dtype, name="k_norm")(k)
        q, k = mark_product(rope.rotate(q, cos, sin)), mark_product(rope.rotate(k, cos, sin))
        k, v = prepend_virtual(self, past, k, mark_product(v))
        out = attend(self, self.options.attention, q, k, v, mask, c.attention_dropout, cached)
        o_proj = residual_dense(c.hidden_size, "o_proj", self.options, bias=c.output_bias)
        return mark_product(constrain(o_proj.join(o_proj(out), residual), BATCH, LENGTH, HIDDEN))


class FeedForward(nn.Module):
    """Gated feed-forward: `down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(self, x: Array, residual: Array) -> Array:
        """Map `x [..., d]` to `[..., d]`, and add it to the residual stream."""
        c, options = self.config, self.options
        gate_proj, up_proj = (
            dense(c.intermediate_size, name, options, bias=c.mlp_bias)
            for name in ("gate_proj", "up_proj")
        )
        gate, up = (
            mark_product(constrain(y, BATCH, LENGTH, MLP)) for y in gate_proj.together(x, up_proj)
        )
        down_proj = residual_dense(c.hidden_size, "down_proj", options, bias=c.mlp_bias)
        out = down_proj.join(down_proj(ACTIVATIONS[c.hidden_act](gate) * up), residual)
        return constrain(out, BATCH, LENGTH, HIDDEN)


class Block(nn.Module):
    """One decoder layer."""

    config: DecoderConfig
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        per_layer: tuple[Array | None, Array | None, tuple[Array, Array] | None],
        cos: Array,
        sin: Array,
        mask: Mask,
        places: Array | None,
    ) -> tuple[Array, None]:
        """Run the layer.

        Args:
            x: `[batch, length, d]`.
            per_layer: its window, an int32 scalar (0 for no limit), its past, and its cached keys
                and values.
            cos: cosines of the rotation angles.
            sin: sines of the rotation angles.
            mask: the attention mask.
            places: `[batch or 1, key]`, positions for the windows; None without windows.
        """
        c, options = self.config, self.options
        x, (window, past, cached) = mark_input(x), per_layer
        if window is not None and places is not None:
            queries = places[:, -x.shape[1] :]
            near = (queries[:, None, :, None] - places[:, None, None, :] < window) | (window == 0)
            mask = mask.restrict(near)
        h = RMSNorm(c.rms_norm_eps, options.dtype, name="input_layernorm")(x)
        x = Attention(c, options, name="self_attn")(h, x, past, cached, cos, sin, mask)
        h = RMSNorm(c.rms_norm_eps, options.dtype, name="post_attention_layernorm")(x)
        return FeedForward(c, options, name="mlp")(h, x), None


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
        cos, sin = rope.tables(c.rope, c.head_dim, c.max_position_embeddings, rotated)
        # the attention kernel handles a window that is the same in all layers, without virtual
        # tokens
        sizes = set(c.windows or ())
        window = max(sizes) if len(sizes) == 1 and not virtual.count and cache is None else 0
        windows = None if c.windows is None or window else jnp.asarray(c.windows, jnp.int32)
        if cache is None:
            places = None if windows is None else virtual.places(segment_ids, length)
            padding = None if options.right_padded else attention_mask
            mask = virtual.mask(make_mask(padding, segment_ids, causal=True, window=window), length)
            mask = mask.prepare(options.attention, length)
        else:
            mask, places = virtual.mask_with_cache(cache, where, attention_mask)
        sow_positions(self, virtual.key_positions(rotated, attention_mask))
        fields = {"config": c, "options": options}
        per_layer = windows, virtual.past, cache and (cache.keys, cache.values)
        x = constrain(virtual.prepend(self.embed_tokens(input_ids)), BATCH, LENGTH, HIDDEN)
        x = run_layers(
            Block,
            fields,
            c.num_hidden_layers,
            "layers",
            options,
            x,
            per_layer,
            cos,
            sin,
            mask,
            places,
        )
        return RMSNorm(c.rms_norm_eps, options.dtype, name="norm")(x)[:, virtual.prompted :]


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
        out = self.model.logits(x) if self.config.tie_word_embeddings else self.lm_head(x)
        out = out.astype(jnp.float32)
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
    tasks = ("causal_lm", "sequence_classification", "token_classification", "encoder")
    problems = option_problems(options, config["model_type"], tasks, ("last", "mean", "cls"))
    kind = DecoderBackbone if options.task == "encoder" else DecoderWithHead
    parsed = read_config(config, problems, where)
    return kind(parsed, with_pooling(options, parsed.own_pooling))


FAMILY = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    build=build,
    prefix="model",
    ignored=(r".*rotary_emb\.inv_freq",),
    optional=(r"lm_head\..*",),
    embedding="embed_tokens.weight",
)
