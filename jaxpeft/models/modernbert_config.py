"""Reading the `config.json` of ModernBERT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxpeft.errors import show
from jaxpeft.models import rope
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import MOST_HEADS, MOST_LAYERS, ConfigReader
from jaxpeft.models.rope import Rope

FULL, SLIDING = "full_attention", "sliding_attention"
POOLINGS = ("cls", "mean")
_THETAS = {FULL: ("global_rope_theta", 160_000.0), SLIDING: ("local_rope_theta", 10_000.0)}
_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 50368,
    "hidden_size": 768,
    "intermediate_size": 1152,
    "num_hidden_layers": 22,
    "num_attention_heads": 12,
    "hidden_activation": "gelu",
    "classifier_activation": "gelu",
    "max_position_embeddings": 8192,
    "norm_eps": 1e-5,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "classifier_pooling": "cls",
}


@dataclass(frozen=True)
class ModernBertConfig:
    """The architecture of a ModernBERT.

    Attributes:
        kind: its `model_type`.
        layer_types: `full_attention` or `sliding_attention` of each layer.
        reach: the farthest position that a query of a sliding layer attends to, on either side.
        ropes: rotary frequencies by layer type.
        own_pooling: pooling of the sequence classifier.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    head_act: str
    max_position_embeddings: int
    norm_eps: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    classifier_bias: bool
    embedding_dropout: float
    attention_dropout: float
    mlp_dropout: float
    classifier_dropout: float
    layer_types: tuple[str, ...]
    reach: int
    ropes: tuple[tuple[str, Rope], ...]
    own_pooling: str

    @property
    def head_dim(self) -> int:
        """The size of an attention head."""
        return self.hidden_size // self.num_attention_heads


def read_config(
    config: Mapping[str, Any], problems: Sequence[str] = (), where: str = "config.json"
) -> ModernBertConfig:
    """Read a ModernBERT's `config.json`.

    Args:
        config: its content.
        problems: known problems, which are raised with the rest.
        where: path of the file, for messages.

    Raises:
        ConfigError: Switches are missing or not supported; it lists all of them.
    """
    reader = ConfigReader(config, _DEFAULTS, problems, where)
    reader.check_quantization()
    layers = reader.integer("num_hidden_layers", most=MOST_LAYERS)
    found = ModernBertConfig(
        kind=config["model_type"],
        vocab_size=reader.integer("vocab_size"),
        hidden_size=reader.integer("hidden_size"),
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=layers,
        num_attention_heads=reader.integer("num_attention_heads", most=MOST_HEADS),
        hidden_act=reader.one_of("hidden_activation", ACTIVATIONS),
        head_act=reader.one_of("classifier_activation", ACTIVATIONS),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        norm_eps=reader.number("norm_eps"),
        norm_bias=reader.flag("norm_bias"),
        attention_bias=reader.flag("attention_bias"),
        mlp_bias=reader.flag("mlp_bias"),
        classifier_bias=reader.flag("classifier_bias"),
        embedding_dropout=reader.rate("embedding_dropout"),
        attention_dropout=reader.rate("attention_dropout"),
        mlp_dropout=reader.rate("mlp_dropout"),
        classifier_dropout=reader.rate("classifier_dropout"),
        layer_types=_layer_types(reader, layers),
        reach=reader.integer("local_attention") // 2,
        ropes=_ropes(reader),
        own_pooling=reader.one_of("classifier_pooling", dict.fromkeys(POOLINGS)),
    )
    if found.hidden_size % found.num_attention_heads:
        reader.problems.append(
            f"num_attention_heads: {found.num_attention_heads} does not divide hidden_size"
            f" {found.hidden_size}"
        )
    elif found.head_dim % 2:
        reader.problems.append(
            "num_attention_heads: the head size must be even for rotary embeddings, is"
            f" {found.head_dim}"
        )
    reader.finish()
    return found


def _layer_types(reader: ConfigReader, layers: int) -> tuple[str, ...]:
    named = reader.get("layer_types")
    if named is None:
        every = reader.integer("global_attn_every_n_layers")
        return tuple(SLIDING if i % every else FULL for i in range(layers))
    known = isinstance(named, list) and all(name in (FULL, SLIDING) for name in named)
    if not known or len(named) != layers:
        reader.problems.append(
            f"layer_types: {show(named)} is not supported (supported: {FULL} or {SLIDING},"
            f" {layers} times)"
        )
        return (FULL,) * layers
    return tuple(named)


def _head_dim(reader: ConfigReader) -> int:
    """Return the head size, or any even number if the config has none, which is reported apart."""
    hidden, heads = reader.get("hidden_size"), reader.get("num_attention_heads")
    valid = isinstance(hidden, int) and isinstance(heads, int) and 0 < heads <= hidden
    return hidden // heads if valid else 2


def _ropes(reader: ConfigReader) -> tuple[tuple[str, Rope], ...]:
    """Read the rotary frequencies of each layer type: one section of `rope_parameters` each, or the
    thetas of earlier versions.
    """
    sections: Any = reader.get("rope_parameters") or {}
    mapping = isinstance(sections, Mapping)
    if not mapping or any(key not in _THETAS for key in cast(Mapping[str, Any], sections)):
        reader.problems.append(
            f"rope_parameters: {show(sections)} is not supported (supported: a section each for"
            f" {FULL} and {SLIDING})"
        )
        sections = {}
    scaling: Any = reader.get("rope_scaling") or {}
    found: list[tuple[str, Rope]] = []
    for name, (field, theta) in _THETAS.items():
        own = {**(sections.get(name) or {}), **(scaling if isinstance(scaling, Mapping) else {})}
        config = {
            "rope_theta": theta if reader.get(field) is None else reader.get(field),
            "rope_parameters": own,
            "max_position_embeddings": reader.get("max_position_embeddings"),
        }
        section = ConfigReader(config, {})
        found.append((name, rope.read(section, _head_dim(reader))))
        reader.problems += [f"{name}: {problem}" for problem in section.problems]
    return tuple(found)
