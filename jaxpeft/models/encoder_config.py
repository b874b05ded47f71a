"""The families of encoders that are built like BERT, as a table, and their `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxpeft.errors import DataError, show
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import MOST_HEADS, MOST_LAYERS, ConfigReader

TASKS = ("sequence_classification", "token_classification", "encoder")
"""Tasks of an encoder."""


@dataclass(frozen=True)
class Style:
    """What is the same in all models of a family.

    Attributes:
        backbone: name of the backbone in a model with a head.
        layers: name of the module with the layers.
        offset: whether positions start after `pad_token_id`, as in RoBERTa.
        head: a sequence classifier's layers before the last one: `none`; `two_layers` inside of
            `classifier`, with the activation `head_act`; or `pre_classifier`.
        head_act: activation inside of the head.
        projection: name of the projection of word embeddings that are narrower than the layers.
        poolings: poolings of a sequence classifier; the first is that of `transformers`.
        defaults: defaults of `config.json`.
    """

    backbone: str
    layers: str = "encoder"
    offset: bool = False
    head: str = "none"
    head_act: str = "tanh"
    projection: str = ""
    poolings: tuple[str, ...] = ("cls", "mean")
    defaults: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder's architecture.

    Attributes:
        kind: its `model_type`, a key of `STYLES`.
        type_vocab_size: number of token types, which may be 0.
        embedding_size: width of the embeddings, `hidden_size` without a projection.
        pad_token_id: start of the positions if the style has an offset.
    """

    kind: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    max_position_embeddings: int
    type_vocab_size: int
    pad_token_id: int
    embedding_size: int
    layer_norm_eps: float
    hidden_dropout: float
    attention_dropout: float
    classifier_dropout: float

    @property
    def style(self) -> Style:
        """The family's entry in the table."""
        return STYLES[self.kind]

    @property
    def own_pooling(self) -> str:
        """The pooling of the sequence classifier in `transformers`."""
        return self.style.poolings[0]

    @property
    def head_act(self) -> str:
        """The activation inside of the head."""
        return self.style.head_act

    @property
    def first_position(self) -> int:
        """The position of a row's first token in the position table."""
        return self.pad_token_id + 1 if self.style.offset else 0

    def check_length(self, length: int, virtual: int) -> None:
        """Raise an error for rows beyond the position table, for which the lookup would return NaN.

        Args:
            length: number of tokens of a row.
            virtual: number of virtual positions.

        Raises:
            DataError: A row is too long.
        """
        most = self.max_position_embeddings - self.first_position
        if length + virtual > most:
            more = f" and {virtual} virtual ones" if virtual else ""
            raise DataError(
                f"input_ids: a row has {length} tokens{more}, but the {self.kind} model supports"
                f" at most {most}; truncate the texts"
            )


_BERT_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "max_position_embeddings": 512,
}
_ROBERTA = Style(
    "roberta", offset=True, head="two_layers", defaults={**_BERT_DEFAULTS, "pad_token_id": 1}
)
STYLES: Mapping[str, Style] = {
    "bert": Style("bert", poolings=("pooler", "cls", "mean"), defaults=_BERT_DEFAULTS),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "electra": Style(
        "electra",
        head="two_layers",
        head_act="gelu",
        projection="embeddings_project",
        defaults={**_BERT_DEFAULTS, "embedding_size": 128},
    ),
    "deberta-v2": Style(
        "deberta",
        defaults={
            **_BERT_DEFAULTS,
            "type_vocab_size": 0,
            "layer_norm_eps": 1e-7,
            "position_biased_input": True,
            "pooler_hidden_act": "gelu",
            "pooler_dropout": 0.0,
            "conv_act": "tanh",
            "conv_groups": 1,
        },
    ),
    "distilbert": Style(
        "distilbert",
        layers="transformer",
        head="pre_classifier",
        head_act="relu",
        defaults={
            "activation": "gelu",
            "dropout": 0.1,
            "attention_dropout": 0.1,
            "seq_classif_dropout": 0.2,
            "max_position_embeddings": 512,
        },
    ),
}
"""Every family by `model_type`."""


def read_config(
    config: Mapping[str, Any], task: str, problems: Sequence[str] = (), where: str = "config.json"
) -> EncoderConfig:
    """Read an encoder's `config.json`.

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
    reader.refuse("is_decoder", "only encoders are supported")
    reader.refuse("add_cross_attention", "only encoders are supported")
    reader.refuse("pruned_heads", "all layers must have all heads")
    positions = reader.get("position_embedding_type")
    if positions not in (None, "absolute"):
        reader.problems.append(
            f"position_embedding_type: {show(positions)} is not supported (supported: absolute)"
        )
    parsed = _distilbert(reader, task) if kind == "distilbert" else _bert(reader, kind)
    if parsed.hidden_size % parsed.num_attention_heads:
        names = (
            ("n_heads", "dim") if kind == "distilbert" else ("num_attention_heads", "hidden_size")
        )
        reader.problems.append(
            f"{names[0]}: {parsed.num_attention_heads} does not divide {names[1]}"
            f" {parsed.hidden_size}"
        )
    reader.finish()
    return parsed


def _bert(reader: ConfigReader, kind: str) -> EncoderConfig:
    hidden_dropout = reader.rate("hidden_dropout_prob")
    hidden_size = reader.integer("hidden_size")
    projected = STYLES[kind].projection and reader.get("embedding_size") is not None
    return EncoderConfig(
        kind=kind,
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("intermediate_size"),
        num_hidden_layers=reader.integer("num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=reader.integer("num_attention_heads", most=MOST_HEADS),
        hidden_act=reader.one_of("hidden_act", ACTIVATIONS),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        type_vocab_size=reader.integer("type_vocab_size"),
        pad_token_id=reader.integer("pad_token_id", least=0) if STYLES[kind].offset else 0,
        embedding_size=reader.integer("embedding_size") if projected else hidden_size,
        layer_norm_eps=reader.number("layer_norm_eps"),
        hidden_dropout=hidden_dropout,
        attention_dropout=reader.rate("attention_probs_dropout_prob"),
        classifier_dropout=reader.rate("classifier_dropout", hidden_dropout),
    )


def _distilbert(reader: ConfigReader, task: str) -> EncoderConfig:
    rates = {"sequence_classification": reader.rate("seq_classif_dropout")}
    hidden_dropout = reader.rate("dropout")
    hidden_size = reader.integer("dim")
    return EncoderConfig(
        kind="distilbert",
        vocab_size=reader.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("hidden_dim"),
        num_hidden_layers=reader.integer("n_layers", most=MOST_LAYERS),
        num_attention_heads=reader.integer("n_heads", most=MOST_HEADS),
        hidden_act=reader.one_of("activation", ACTIVATIONS),
        max_position_embeddings=reader.integer("max_position_embeddings"),
        type_vocab_size=0,
        pad_token_id=0,
        embedding_size=hidden_size,
        layer_norm_eps=1e-12,
        hidden_dropout=hidden_dropout,
        attention_dropout=reader.rate("attention_dropout"),
        classifier_dropout=rates.get(task, hidden_dropout),
    )
