"""The architecture of a decoder as a composition of parts, and the reading of `config.json`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models import rope
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.attention_scores import Scoring
from jaxpeft.models.base import MOST_HEADS, MOST_LAYERS, ConfigReader
from jaxpeft.models.delta_net import DeltaNet
from jaxpeft.models.experts import Mixture
from jaxpeft.models.latent_attention import Latent
from jaxpeft.models.layer_embeddings import LayerEmbedding
from jaxpeft.models.layer_types import LayerTypes, no_windows, read_windows
from jaxpeft.models.rope import Rope, RopeSwitches


@dataclass(frozen=True)
class NormNames:
    """The norms of a layer, by the names of their modules; empty for none.

    With all four, `h = x + n2(attention(n1(x)))` and `y = h + n4(mlp(n3(h)))`.

    Attributes:
        before_attention: n1.
        after_attention: n2.
        before_mlp: n3.
        after_mlp: n4.
    """

    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers of equal leaves.

    Attributes:
        window: window size of the attention, including the query itself; 0 for no limit.
        rope: index of the rotation in `DecoderConfig.ropes`.
    """

    window: int = 0
    rope: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder's architecture; names without a description are those of `config.json`.

    Attributes:
        classifier_bias: whether the token classification head has a bias.
        rope: rotation of queries and keys.
        qkv_bias: whether the projections to queries, keys and values have biases.
        output_bias: whether the projection after attention has a bias.
        qk_norm: whether queries and keys are normalized.
        windows: window size of each layer, including the query itself; 0 for no limit. None if all
            are 0.
        norms: the norms of a layer.
        norm_offset: offset of the norms' scales, see `RMSNorm`.
        fused_qkv: whether one module `qkv_proj` computes queries, keys and values.
        fused_gate_up: whether one module `gate_up_proj` computes both parts of the feed-forward.
        wide_qk_norm: whether the norms of queries and keys are over all heads together.
        attention_scale: see `Scoring`.
        attention_cap: see `Scoring`.
        logits_cap: bounds the logits of a language model: `cap tanh(z / cap)`; None for no bound.
        logits_scale: multiplies these logits.
        embedding_scale: multiplies the word embeddings, rounded to the activations' dtype.
        input_scale: multiplies the first layer's input, with that of virtual tokens.
        residual_scale: multiplies the outputs of attention and feed-forward.
        residual_dropout: dropout rate of these outputs.
        query_growth: beta and b of queries that grow with their position p: they are multiplied by
            `1 + beta ln(1 + floor(p / b))`. None if they do not.
        other_ropes: rotations of further layers.
        layer_ropes: index of each layer's rotation in `ropes`; None if all are 0.
        output_gate: whether `q_proj` also computes a gate for each head, whose sigmoid multiplies
            the output of the head.
        delta_net: what replaces attention; None for attention.
        mixture: the experts of each layer; None if its feed-forward is dense.
        value_norm: whether values are normalized, without a scale: `v / sqrt(mean(v^2) + eps)`.
        keys_as_values: whether values are the projection to keys, before norm and rotation.
        kept_as: index of the layer, if later layers attend to its keys and values.
        keys_of: index of the layer to whose keys and values a layer attends, with queries of its
            own; None if it has keys.
        layer_scalar: whether the output of a layer is multiplied by a number of its own.
        layer_embedding: the embeddings of tokens for each layer; None if there are none.
        latent: the sizes of latent attention; None without it. `head_dim` is then that of a key.
        ignored: regular expressions of tensor names, without the prefix, that no task reads.
        attention_sinks: whether each head has a sink, see `Scoring`.
        per_layer: the architecture of each layer, if their leaves differ; empty if all have these
            fields.
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
    rope: Rope
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int, ...] | None
    pad_token_id: int | None
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    fused_qkv: bool = False
    fused_gate_up: bool = False
    wide_qk_norm: bool = False
    attention_scale: float | None = None
    attention_cap: float | None = None
    logits_cap: float | None = None
    logits_scale: float = 1.0
    embedding_scale: float = 1.0
    input_scale: float = 1.0
    residual_scale: float = 1.0
    residual_dropout: float = 0.0
    query_growth: tuple[float, float] | None = None
    other_ropes: tuple[Rope, ...] = ()
    layer_ropes: tuple[int, ...] | None = None
    output_gate: bool = False
    delta_net: DeltaNet | None = None
    mixture: Mixture | None = None
    value_norm: bool = False
    keys_as_values: bool = False
    kept_as: int | None = None
    keys_of: int | None = None
    layer_scalar: bool = False
    layer_embedding: LayerEmbedding | None = None
    latent: Latent | None = None
    ignored: tuple[str, ...] = ()
    attention_sinks: bool = False
    per_layer: tuple[DecoderConfig, ...] = ()

    def of_layer(self, index: int) -> DecoderConfig:
        """Return the architecture of a layer."""
        return self.per_layer[index] if self.per_layer else self

    @property
    def with_keys(self) -> DecoderConfig:
        """The architecture of a layer that computes its own keys, as the only layer of a model."""
        return replace(self, keys_of=None)

    @property
    def own_pooling(self) -> str:
        """The pooling of the sequence classifier in `transformers`."""
        return "last"

    @property
    def num_experts(self) -> int:
        """The number of experts of a layer, 0 if its feed-forward is dense."""
        return 0 if self.mixture is None else self.mixture.experts

    @property
    def scoring(self) -> Scoring:
        """How attention scores become logits."""
        scale, sharpness = self.attention_scale, self.rope.sharpness
        if sharpness != 1:
            scale = sharpness * Scoring(scale).scale_of(self.head_dim)
        return Scoring(scale, self.attention_cap, self.attention_sinks)

    @property
    def rotary_dim(self) -> int:
        """The number of dimensions of a head to which the rotation belongs."""
        return self.head_dim if self.latent is None else self.latent.rotated

    @property
    def value_dim(self) -> int:
        """The size of a value head."""
        return self.head_dim if self.latent is None else self.latent.value

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """All rotations."""
        return (self.rope, *self.other_ropes)

    @property
    def rope_sizes(self) -> tuple[int, ...]:
        """The rotated size of the heads of the layers with each of the rotations."""
        kinds, count = self.layer_kinds, len(self.ropes)
        sizes = {kind.rope: self.of_layer(i).rotary_dim for i, kind in enumerate(kinds)}
        return tuple(sizes.get(i, self.rotary_dim) for i in range(count))

    @property
    def widest_head(self) -> int:
        """The size of the largest heads of a layer."""
        return max(self.of_layer(i).head_dim for i in range(self.num_hidden_layers))

    @property
    def projections(self) -> tuple[str, ...]:
        """The modules of a layer that compute queries, keys and values, if they are separate."""
        if self.keys_of is not None:
            return ("q_proj",)
        return ("q_proj", "k_proj") if self.keys_as_values else ("q_proj", "k_proj", "v_proj")

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The kind of each layer."""
        count = self.num_hidden_layers
        none = (0,) * count
        pairs = zip((self.windows or none)[:count], (self.layer_ropes or none)[:count], strict=True)
        return tuple(LayerKind(*pair) for pair in pairs)

    @property
    def unequal_layers(self) -> tuple[tuple[DecoderConfig, LayerKind], ...]:
        """What distinguishes each layer if their leaves differ; empty if they do not."""
        return tuple(zip(self.per_layer, self.layer_kinds, strict=bool(self.per_layer)))


Part = Any | Callable[[ConfigReader], Any]


@dataclass(frozen=True)
class DecoderFamily:
    """One architecture: what distinguishes its config and its parts from Llama's.

    Attributes:
        model_type: its `model_type`.
        defaults: defaults of its `config.json`.
        layer_types: returns the kind of each layer.
        ropes: spelling of the rotation of each kind of layer; all layers have the first, unless
            there are several.
        parts: fields of `DecoderConfig`: constants, or functions of the reader.
        latent: returns the sizes of latent attention; None without it.
        layer_parts: returns the fields in which each layer differs from `parts`; None if its leaves
            are those of every layer.
        refused: switches that must be off, with the reason.
        ignored: regular expressions of tensor names, without the prefix, that no task reads.
        quantized: methods of quantization of its checkpoints that are read, besides `bitsandbytes`.
    """

    model_type: str
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])
    layer_types: LayerTypes = no_windows
    ropes: tuple[RopeSwitches, ...] = (RopeSwitches(),)
    parts: Mapping[str, Part] = field(default_factory=dict[str, Part])
    latent: Callable[[ConfigReader], Latent] | None = None
    layer_parts: Callable[[ConfigReader, int], Sequence[Mapping[str, Any]]] | None = None
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    ignored: tuple[str, ...] = ()
    quantized: tuple[str, ...] = ()


_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "token_classification_bias": True,
    "rope_theta": 10000.0,
    "max_window_layers": 28,
}


def flag(name: str) -> Callable[[ConfigReader], bool]:
    """Return the part that a switch of `config.json` turns on."""
    return lambda reader: reader.flag(name)


ATTENTION_BIAS: Mapping[str, Part] = {
    "qkv_bias": flag("attention_bias"),
    "output_bias": flag("attention_bias"),
}
"""One switch for the biases of all projections of attention."""


def positive(name: str) -> Callable[[ConfigReader], float]:
    """Return the part that is a positive number of `config.json`."""
    return lambda reader: reader.positive(name, reader.get(name))


def maybe_number(name: str) -> Callable[[ConfigReader], float | None]:
    """Return the part that is a positive number of `config.json`, or null."""

    def read(reader: ConfigReader) -> float | None:
        value = reader.get(name)
        return None if value is None else reader.positive(name, value)

    return read


def read_config(
    family: DecoderFamily,
    config: Mapping[str, Any],
    problems: Sequence[str] = (),
    where: str = "config.json",
) -> DecoderConfig:
    """Read a decoder's `config.json`.

    Args:
        family: its architecture.
        config: its content.
        problems: known problems, which are raised with the rest.
        where: path of the file, for messages.

    Raises:
        ConfigError: Switches are missing or not supported; it lists all of them.
    """
    reader = ConfigReader(config, {**_DEFAULTS, **family.defaults}, problems, where)
    reader.check_quantization(*family.quantized)
    layers = reader.integer("num_hidden_layers", most=MOST_LAYERS)
    latent = family.latent(reader) if family.latent else None
    heads, kv_heads, head_dim = _latent_heads(reader, latent) if latent else _heads(reader)
    fields: dict[str, Any] = {
        "vocab_size": reader.integer("vocab_size"),
        "hidden_size": reader.integer("hidden_size"),
        "intermediate_size": reader.integer("intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": reader.integer("max_position_embeddings"),
        "rms_norm_eps": reader.number("rms_norm_eps"),
        "tie_word_embeddings": reader.flag("tie_word_embeddings"),
        "attention_dropout": reader.rate("attention_dropout"),
        "classifier_dropout": reader.rate("classifier_dropout", reader.rate("hidden_dropout", 0.1)),
        "classifier_bias": reader.flag("token_classification_bias"),
        "pad_token_id": (
            None if reader.get("pad_token_id") is None else reader.integer("pad_token_id", least=0)
        ),
        "latent": latent,
        **_layers(family, reader, layers, latent.rotated if latent else head_dim),
    }
    parts = {**_LLAMA_PARTS, **family.parts}
    fields |= {name: part(reader) if callable(part) else part for name, part in parts.items()}
    differing = family.layer_parts(reader, layers) if family.layer_parts else ()
    for name, why in family.refused.items():
        reader.refuse(name, why)
    reader.finish()
    found = DecoderConfig(**fields)
    layers_own = tuple(replace(found, **own) for own in differing)
    if len({*layers_own}) == 1:
        return layers_own[0]
    return replace(found, per_layer=layers_own)


_LLAMA_PARTS: Mapping[str, Part] = {
    "hidden_act": lambda reader: reader.one_of("hidden_act", ACTIVATIONS),
    "qkv_bias": False,
    "output_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
}


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


def _latent_heads(reader: ConfigReader, latent: Latent) -> tuple[int, int, int]:
    """Return the numbers of query and key heads, and the size of both."""
    name = "num_key_value_heads"
    given = reader.get(name)
    if given is not None and given != latent.heads:
        reader.problems.append(
            f"{name}: is {show(given)}, but each of the {latent.heads} num_attention_heads has its"
            " own keys in latent attention"
        )
    if latent.rotated % 2:
        reader.problems.append(
            f"qk_rope_head_dim: must be even for rotary embeddings, is {latent.rotated}"
        )
    return latent.heads, latent.heads, latent.size


def _layers(
    family: DecoderFamily, reader: ConfigReader, layers: int, head_dim: int
) -> dict[str, Any]:
    """Return the windows and rotations of the layers."""
    types = family.layer_types(reader, layers)
    windows = read_windows(reader, types)
    ropes = [rope.read(reader, head_dim, switches) for switches in family.ropes]
    if len(ropes) == 1:
        return {"windows": windows, "rope": ropes[0]}
    order = [switches.layers for switches in family.ropes]
    return {
        "windows": windows,
        "rope": ropes[0],
        "other_ropes": tuple(ropes[1:]),
        "layer_ropes": tuple(order.index(kind) for kind in types),
    }
