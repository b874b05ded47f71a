"""Rows to evaluate, read and tokenized as in the run that trained the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.config.data_config import DataConfig
from jaxpeft.config.model_config import ModelConfig
from jaxpeft.config.schema import Config
from jaxpeft.core.options import parse
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.examples.labeling import BY_USER, Labeling
from jaxpeft.data.examples.labels import ProblemType
from jaxpeft.data.examples.make import Examples, make_examples
from jaxpeft.data.examples.reading import columns_of, read_source, recognize
from jaxpeft.data.order import order
from jaxpeft.data.rows.columns import GENERATIVE, Kind, find_columns
from jaxpeft.data.rows.read import Rows
from jaxpeft.data.tokens.row_encoder import RowEncoder
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.hub.adapters.settings import Settings
from jaxpeft.hub.base_head import read_head
from jaxpeft.inference.adapted_model import AdaptedModel

PROBLEMS: Mapping[str, ProblemType] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


@dataclass(frozen=True)
class PreparedRows:
    """Rows of a file, for one model.

    Attributes:
        examples: the rows.
        encoded: their tokens.
        kept: rows with tokens in the loss, int [n], ascending; the others are not evaluated.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        encoder: tokenizes the rows.
    """

    examples: Examples
    encoded: Encoded
    kept: np.ndarray
    problem: str
    encoder: RowEncoder

    @property
    def labels(self) -> tuple[str, ...]:
        """The label names by id."""
        return self.examples.label_names


def prepare_rows(
    path: str,
    loaded: AdaptedModel,
    overrides: Mapping[str, Any],
    *,
    limit: int | None = None,
    seed: int = 0,
    check_dropped: bool = True,
) -> PreparedRows:
    """Read and tokenize rows.

    Args:
        path: a file, a folder of files, a packaged data set, or a hub id, whose test split is used.
        loaded: the model.
        overrides: options of `config.data` that replace the recorded ones.
        limit: maximum number of rows, sampled by the seed; None for all.
        seed: seed of the sample.
        check_dropped: whether to refuse rows of which many have no token in the loss.

    Raises:
        ConfigError: An option does not fit the rows or the model.
        DataError: Rows cannot be used.
    """
    task: Any = loaded.model.options.task
    if task == "encoder":
        raise ConfigError("--task: an encoder has no outputs to evaluate; use another task")
    config = Config(
        model=ModelConfig(path=str(loaded.model.source.folder), task=task),
        data=data_options(loaded.settings, path, overrides),
    )
    rows, kind = recognize(config, _sample(read_source(path, "test", config), limit, seed))
    examples = _examples(rows, kind, config, loaded)
    encoder = RowEncoder(config.data, loaded.tokenizer, loaded.model.config.vocab_size)
    encoded = encoder(examples, check_dropped=check_dropped)
    problem = {"classification": str(examples.problem), "token_classification": "token"}
    return PreparedRows(examples, encoded, _in_loss(encoded), problem.get(kind, "lm"), encoder)


def data_options(settings: Settings, path: str, overrides: Mapping[str, Any]) -> DataConfig:
    """Return the data options of an adapter's run, with other rows.

    Args:
        settings: settings of the run.
        path: the rows.
        overrides: options that replace the recorded ones.

    Raises:
        ConfigError: A recorded option is invalid.
    """
    recorded = {
        **({"separator": settings.separator} if settings.separator else {}),
        **(settings.data or {}),
    }
    options, problems = parse(DataConfig, {**recorded, **overrides, "train": path}, "data")
    if options is None:
        hint = "data options are recorded in the adapter's jaxpeft.json, or set by flags"
        raise ConfigError([*problems, hint])
    return options


def _sample(rows: Rows, limit: int | None, seed: int) -> Rows:
    if limit is None or limit >= len(rows):
        return rows
    return rows.take(sorted(order(len(rows), seed)[:limit].tolist()))


def _examples(rows: Rows, kind: Kind, config: Config, loaded: AdaptedModel) -> Examples:
    columns = columns_of(config, kind)
    if kind == "preference":
        raise DataError(f"{rows.name}: preference pairs cannot be evaluated; use rows with answers")
    if kind in GENERATIVE:
        return make_examples(rows, kind=kind, columns=columns)
    problem = problem_of(loaded, kind)
    labeling = labeling_of(config.data, loaded)
    if problem == "multi_label":
        column = find_columns(rows.columns(), columns, kind, rows.name).label or ""
        labeling = labeling.with_vectors([record.get(column) for record in rows.records])
    like = Examples(kind, problem, [], None, None, labeling, columns, rows.take([]))
    return make_examples(rows, kind=kind, columns=columns, like=like)


def problem_of(loaded: AdaptedModel, kind: Kind) -> ProblemType | None:
    """Return the problem type of a classifier, of its run or of the base's head, or None."""
    problem = PROBLEMS.get(str(loaded.settings.problem_type))
    if problem is None and kind == "classification":
        head = read_head(loaded.model.source, loaded.model.options.task)
        problem = head.problem if head else None
        if loaded.model.options.num_labels == 1:
            problem = "regression"
    return problem


def labeling_of(options: DataConfig, loaded: AdaptedModel) -> Labeling:
    """Return the labels of a classifier: those of the run, of the base's head, or numbers."""
    names, origin = loaded.settings.labels, BY_USER if options.labels else ""
    if not names:
        head = read_head(loaded.model.source, loaded.model.options.task)
        count = loaded.model.options.num_labels or (head.size if head else 0)
        named = head.names if head is not None and head.size == count else ()
        names, origin = named or tuple(map(str, range(count))), BY_USER
    return Labeling(names, origin, separator=options.label_separator, unlabeled=options.unlabeled)


def _in_loss(encoded: Encoded) -> np.ndarray:
    """Return the rows with labels that the model must predict."""
    if not encoded.per_token:
        return np.unique(encoded.source)
    labeled = encoded.labels != IGNORED
    if encoded.kind != "token_classification":
        labeled[encoded.offsets[:-1][encoded.lengths > 0]] = False
    return np.unique(np.repeat(encoded.source, encoded.lengths)[labeled])
