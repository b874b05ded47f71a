"""Reading the `config.json` of DeBERTa-v2 and v3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from jaxpeft.errors import show
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import MOST_HEADS, MOST_LAYERS, ConfigReader
from jaxpeft.models.encoder_config import STYLES, EncoderConfig

TERMS = ("c2p", "p2c")
"""Terms of disentangled attention: content to position, position to content."""


@dataclass(frozen=True)
class Conv:
    """The convolution beside the first layer.

    Attributes:
        size: number of positions that it reads, odd.
        groups: groups of features.
        act: activation.
    """

    size: int
    groups: int
    act: str


@dataclass(frozen=True)
class DebertaConfig(EncoderConfig):
    """The architecture of a DeBERTa-v2 or v3.

    Attributes:
        absolute: whether a position table is added to the embeddings.
        relative: whether attention depends on relative positions.
        terms: its terms, of `TERMS`; they also count in the scale of the scores.
        span: number of rows of the relative table on each side.
        buckets: `position_buckets`, 0 if relative positions are not bucketed.
        farthest: `max_relative_positions`, from which on they share a bucket.
        shared: whether relative positions are projected by the layer's own keys and queries.
        normed: whether the relative table is normalized.
        conv: the convolution, or None.
        pooler_dropout: dropout before the context pooler.
        pooler_act: activation of the context pooler.
    """

    absolute: bool
    relative: bool
    terms: tuple[str, ...]
    span: int
    buckets: int
    farthest: int
    shared: bool
    normed: bool
    conv: Conv | None
    pooler_dropout: float
    pooler_act: str

    @property
    def head_act(self) -> str:
        """The activation inside of the head."""
        return self.pooler_act


def read_config(
    config: Mapping[str, Any], task: str, problems: Sequence[str] = (), where: str = "config.json"
) -> DebertaConfig:
    """Read a DeBERTa's `config.json`.

    Args:
        config: its content.
        task: the task, which determines the head's dropout.
        problems: known problems, which are raised with the rest.
        where: path of the file, for messages.

    Raises:
        ConfigError: Switches are missing or not supported; it lists all of them.
    """
    kind = config["model_type"]
    reader = ConfigReader(config, STYLES[kind].defaults, problems, where)
    reader.check_quantization()
    hidden_dropout = reader.rate("hidden_dropout_prob")
    hidden = reader.integer("hidden_size")
    heads = reader.integer("num_attention_heads", most=MOST_HEADS)
    _check_widths(reader, hidden, heads)
    sequence = task == "sequence_classification"
    relative = reader.flag("relative_attention")
    positions = reader.integer("max_position_embeddings")
    farthest = _at_least_one(reader, "max_relative_positions", positions)
    buckets = _at_least_one(reader, "position_buckets", 0)
    found = DebertaConfig(
        kind=kind,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        hidden_act=reader.one_of("hidden_act", ACTIVATIONS),
        max_position_embeddings=positions,
        type_vocab_size=reader.integer("type_vocab_size", least=0),
        pad_token_id=0,
        embedding_size=_at_least_one(reader, "embedding_size", hidden),
        layer_norm_eps=reader.number("layer_norm_eps"),
        hidden_dropout=hidden_dropout,
        attention_dropout=reader.rate("attention_probs_dropout_prob"),
        classifier_dropout=reader.rate("cls_dropout", hidden_dropout)
        if sequence
        else hidden_dropout,
        absolute=reader.flag("position_biased_input"),
        relative=relative,
        terms=_terms(reader),
        span=buckets or farthest,
        buckets=buckets,
        farthest=farthest,
        shared=reader.flag("share_att_key"),
        normed=_normed(reader),
        conv=_conv(reader, hidden),
        pooler_dropout=reader.rate("pooler_dropout"),
        pooler_act=reader.one_of("pooler_hidden_act", ACTIVATIONS),
    )
    reader.finish()
    return found


def _at_least_one(reader: ConfigReader, key: str, default: int) -> int:
    """Return an integer; `default` if it is null or below one, as in `transformers`."""
    value = reader.get(key)
    unset = value is None or (isinstance(value, int) and not isinstance(value, bool) and value < 1)
    return default if unset else reader.integer(key)


def _check_widths(reader: ConfigReader, hidden: int, heads: int) -> None:
    if hidden % heads:
        reader.problems.append(f"num_attention_heads: {heads} does not divide hidden_size {hidden}")
    for key, wanted in (("attention_head_size", hidden // heads), ("pooler_hidden_size", hidden)):
        if reader.get(key) not in (None, wanted):
            reader.problems.append(
                f"{key}: {show(reader.get(key))} is not supported (supported: {wanted})"
            )


def _terms(reader: ConfigReader) -> tuple[str, ...]:
    named: Any = reader.get("pos_att_type") or []
    if isinstance(named, str):
        named = [part.strip() for part in named.lower().split("|")]
    if not isinstance(named, list) or any(term not in TERMS for term in cast(Sequence[Any], named)):
        reader.problems.append(
            f"pos_att_type: {show(named)} is not supported (supported: {', '.join(TERMS)})"
        )
        return ()
    return tuple(term for term in TERMS if term in named)


def _normed(reader: ConfigReader) -> bool:
    named: Any = reader.get("norm_rel_ebd")
    if named not in (None, "none", "layer_norm"):
        reader.problems.append(
            f"norm_rel_ebd: {show(named)} is not supported (supported: none, layer_norm)"
        )
    return named == "layer_norm"


def _conv(reader: ConfigReader, hidden: int) -> Conv | None:
    size = _at_least_one(reader, "conv_kernel_size", 0)
    if not size:
        return None
    groups = reader.integer("conv_groups")
    if size % 2 == 0:
        reader.problems.append(f"conv_kernel_size: must be odd, is {size}")
    if hidden % groups:
        reader.problems.append(f"conv_groups: {groups} does not divide hidden_size {hidden}")
    return Conv(size, groups, reader.one_of("conv_act", ACTIVATIONS))
