"""The decoder family: Llama 2 and 3, Mistral, Qwen2 and 2.5, Qwen3; one implementation, driven by the config.

Touvron et al. 2023 (arXiv:2302.13971), Jiang et al. 2023 (arXiv:2310.06825), Qwen team 2024 and 2025 (arXiv:2407.10671,
arXiv:2505.09388).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models import rope
from jaxpeft.models.base import ConfigReader, Family, Options, Pretrained, check_options
from jaxpeft.models.layers import (
    ACTIVATIONS,
    RMSNorm,
    allowed,
    attend,
    dense,
    dropout,
    head_dense,
    pool,
    positions,
    run_layers,
)

Array = jax.Array


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture; the names are those of `config.json`, `windows` apart.

    Attributes:
        windows: one a layer: how many positions back a query sees, itself included; 0 for all. None if all are 0.
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
    rope: rope.Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...] | None


_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu", "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "attention_dropout": 0.0,
    "classifier_dropout": None, "attention_bias": False, "mlp_bias": False, "head_dim": None, "rope_theta": 10000.0,
    "num_key_value_heads": None, "use_sliding_window": False, "sliding_window": None, "max_window_layers": 28,
}  # fmt: skip
_OWN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"sliding_window": 4096},
    "qwen3": {"sliding_window": 4096, "head_dim": 128},
}


def read_config(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a decoder's `config.json`.

    Raises:
        ConfigError: listing every switch that is missing or not supported.
    """
    kind = config["model_type"]
    reader = ConfigReader(config, {**_DEFAULTS, **_OWN_DEFAULTS.get(kind, {})})
    reader.refuse("quantization_config", "load the unquantized model")
    hidden, heads = reader.number("hidden_size"), reader.number("num_attention_heads")
    layers = reader.number("num_hidden_layers")
    bias = bool(reader.get("attention_bias")) and kind in ("llama", "qwen3")
    dropped = reader.get("classifier_dropout")
    parsed = DecoderConfig(
        vocab_size=reader.number("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.number("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=reader.get("num_key_value_heads") or heads,
        head_dim=reader.get("head_dim") or hidden // heads,
        hidden_act=reader.one_of("hidden_act", ACTIVATIONS),
        max_position_embeddings=reader.number("max_position_embeddings"),
        rms_norm_eps=reader.number("rms_norm_eps"),
        tie_word_embeddings=bool(reader.get("tie_word_embeddings")),
        attention_dropout=reader.get("attention_dropout") or 0.0,
        classifier_dropout=0.1 if dropped is None else dropped,
        rope=rope.read(reader),
        qkv_bias=bias or kind == "qwen2",
        output_bias=bias,
        mlp_bias=bool(reader.get("mlp_bias")) and kind == "llama",
        qk_norm=kind == "qwen3",
        windows=_windows(reader, kind, layers),
    )
    if parsed.num_attention_heads % parsed.num_key_value_heads:
        reader.problems.append(f"num_key_value_heads: {parsed.num_key_value_heads} does not divide {heads} heads")
    reader.finish()
    return parsed


def _windows(reader: ConfigReader, kind: str, layers: int) -> tuple[int, ...] | None:
    window = reader.get("sliding_window")
    if kind == "llama" or not window or (kind.startswith("qwen") and not reader.get("use_sliding_window")):
        return None
    named = reader.get("layer_types")
    if kind == "mistral":
        sliding = [True] * layers
    elif named is not None:
        unknown = sorted(set(named) - {"full_attention", "sliding_attention"})
        if unknown or len(named) != layers:
            reader.problems.append(f"layer_types: {named!r} must name full_attention or sliding_attention {layers} times")
        sliding = [name == "sliding_attention" for name in named]
    else:
        sliding = [i >= reader.number("max_window_layers") for i in range(layers)]
    return tuple(window if on else 0 for on in sliding) if any(sliding) else None


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    config: DecoderConfig
    options: Options

    @nn.compact
    def __call__(self, x: Array, cos: Array, sin: Array, mask: Array) -> Array:
        """Attends: `x [batch, length, d]`, the rotation tables, `mask` broadcast to `[batch, 1, query, key]`."""
        c, batch, length = self.config, *x.shape[:2]
        bias = c.qkv_bias

        def project(heads: int, name: str) -> Array:
            out = dense(heads * c.head_dim, name, self.options, bias=bias)(x)
            return out.reshape(batch, length, heads, c.head_dim)

        q, k = project(c.num_attention_heads, "q_proj"), project(c.num_key_value_heads, "k_proj")
        v = project(c.num_key_value_heads, "v_proj")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, self.options.dtype, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, self.options.dtype, name="k_norm")(k)
        q, k = rope.rotate(q, cos, sin), rope.rotate(k, cos, sin)
        out = attend(self, q, k, v, mask, c.attention_dropout)
        return dense(c.hidden_size, "o_proj", self.options, bias=c.output_bias)(out)


class FeedForward(nn.Module):
    """Gated feed-forward: `down(act(gate(x)) * up(x))` (Shazeer 2020, arXiv:2002.05202)."""

    config: DecoderConfig
    options: Options

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Maps `[..., d]` to `[..., d]`."""
        c, options = self.config, self.options
        gate = dense(c.intermediate_size, "gate_proj", options, bias=c.mlp_bias)(x)
        up = dense(c.intermediate_size, "up_proj", options, bias=c.mlp_bias)(x)
        return dense(c.hidden_size, "down_proj", options, bias=c.mlp_bias)(ACTIVATIONS[c.hidden_act](gate) * up)


class Block(nn.Module):
    """One decoder layer."""

    config: DecoderConfig
    options: Options

    @nn.compact
    def __call__(self, x: Array, window: Array | None, cos: Array, sin: Array, mask: Array) -> tuple[Array, None]:
        """Runs the layer; `window` is an int32 scalar, 0 for no limit."""
        c, options = self.config, self.options
        if window is not None:
            index = jnp.arange(x.shape[1])
            near = (index[:, None] - index[None, :] < window) | (window == 0)
            mask = mask & near
        h = RMSNorm(c.rms_norm_eps, options.dtype, name="input_layernorm")(x)
        x = x + Attention(c, options, name="self_attn")(h, cos, sin, mask)
        h = RMSNorm(c.rms_norm_eps, options.dtype, name="post_attention_layernorm")(x)
        return x + FeedForward(c, options, name="mlp")(h), None


class DecoderBackbone(Pretrained):
    """Embedding, layers and final norm: the model of task `encoder`."""

    def setup(self) -> None:
        """Makes the embedding, which a tied head shares."""
        self.embed_tokens = nn.Embed(self.config.vocab_size, self.config.hidden_size, dtype=self.options.dtype)

    def logits(self, x: Array) -> Array:
        """Gives the logits of a tied head: `x E^T`."""
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
    ) -> Array:
        """Gives the hidden states after the final norm, `[batch, length, d]`; `token_type_ids` mean nothing here."""
        del token_type_ids
        c, options = self.config, self.options
        batch, length = input_ids.shape
        where = positions(segment_ids, batch, length) if position_ids is None else position_ids
        cos, sin = rope.tables(c.rope, c.head_dim, c.max_position_embeddings, where)
        mask = allowed(attention_mask, segment_ids, length, causal=True)
        windows = None if c.windows is None else jnp.asarray(c.windows, jnp.int32)
        fields = {"config": c, "options": options}
        x = run_layers(
            Block, fields, c.num_hidden_layers, "layers", options, self.embed_tokens(input_ids), windows, cos, sin, mask
        )
        return RMSNorm(c.rms_norm_eps, options.dtype, name="norm")(x)


class DecoderWithHead(Pretrained):
    """A decoder with a language-model or classification head."""

    @nn.compact
    def __call__(self, input_ids: Array, attention_mask: Array | None = None, **inputs: Any) -> Array:
        """Gives float32 logits: of every position, or one row a text for sequence classification."""
        c, options = self.config, self.options
        backbone = DecoderBackbone(c, options, name="model")
        x = backbone(input_ids, attention_mask, **inputs)
        if options.task == "causal_lm":
            tied = c.tie_word_embeddings
            out = backbone.logits(x) if tied else dense(c.vocab_size, "lm_head", options, bias=False)(x)
            return out.astype(jnp.float32)
        labels = options.num_labels or 0
        if options.task == "token_classification":
            return head_dense(labels, "score")(dropout(self, c.classifier_dropout, x))
        return head_dense(labels, "score", bias=False)(pool(x, attention_mask, options.pooling or "last"))


def build(config: Mapping[str, Any], options: Options) -> Pretrained:
    """Makes a decoder from its `config.json`.

    Raises:
        ConfigError: listing everything that is not supported.
    """
    tasks = ("causal_lm", "sequence_classification", "token_classification", "encoder")
    check_options(options, config["model_type"], tasks, ("last", "mean"))
    kind = DecoderBackbone if options.task == "encoder" else DecoderWithHead
    return kind(read_config(config), options)


FAMILY = Family(
    model_types=("llama", "mistral", "qwen2", "qwen3"),
    build=build,
    prefix="model",
    ignored=(r".*rotary_emb\.inv_freq", r"lm_head\..*"),
)
