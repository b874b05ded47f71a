"""Load the examples of the three splits from a config: read, sample, hold out and mix sources."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxpeft.config.schema import Config
from jaxpeft.data.examples.labeling import Labeling, labeling_of, select_labeled
from jaxpeft.data.examples.labels import ProblemType
from jaxpeft.data.examples.make import Examples, join, make_examples, split_at
from jaxpeft.data.order import order
from jaxpeft.data.rows.columns import GENERATIVE, Columns, Kind, find_columns, find_format
from jaxpeft.data.rows.file_options import GIB, FileOptions
from jaxpeft.data.rows.folders import sibling_split
from jaxpeft.data.rows.holdout import hold_out, hold_out_text
from jaxpeft.data.rows.read import Rows, is_hub_id, read_rows
from jaxpeft.data.rows.unread import filled_columns, find_unread, plain_texts, refuse_partial
from jaxpeft.errors import ConfigError, DataError
from jaxpeft.hub.base_head import BaseHead, read_head
from jaxpeft.hub.sources import Source

_log = logging.getLogger(__name__)
_KINDS: Mapping[str, Kind] = {
    "sequence_classification": "classification",
    "token_classification": "token_classification",
}


def read_examples(
    config: Config, source: Source | None = None
) -> tuple[Examples, Examples, Examples]:
    """Load the training, validation and test examples; validation replaces a missing test split.

    Args:
        config: the config of the run.
        source: the base, whose head may name the classes; None if its files are unavailable.

    Raises:
        ConfigError: an option does not fit the rows.
        DataError: rows cannot be used.
    """
    options = config.data
    recognized = [
        recognize(config, read_source(path, "train", config), log=True) for path in options.sources
    ]
    sources = [rows for rows, _ in recognized]
    kinds: list[Kind] = [kind for _, kind in recognized]
    # take labels from all rows: sampling and holding out rows must not change the classes
    all_examples = None
    if kinds[0] not in GENERATIVE:
        labeling = labeling_of(config.data, _head(config, source))
        all_examples = _examples(
            _join_sources(sources, kinds[0], config), kinds[0], config, labeling=labeling
        )
    sources = [_sample(rows, config) for rows in sources]
    held_out: list[Rows] = []
    if not options.validation:
        pairs = [_hold_out(rows, kind, config) for rows, kind in zip(sources, kinds, strict=True)]
        sources, held_out = [kept for kept, _ in pairs], [out for _, out in pairs]
    sources = mix(sources, options.weights, config.train.seed)
    train = join(
        [
            _examples(rows, kind, config, all_examples)
            for rows, kind in zip(sources, kinds, strict=True)
        ]
    )
    if not held_out:
        return train, *read_holdout(config, all_examples or train)
    validation = join(
        [
            _examples(rows, kind, config, all_examples)
            for rows, kind in zip(held_out, kinds, strict=True)
        ]
    )
    return train, validation, _test(config, all_examples or train, validation)


def _join_sources(sources: Sequence[Rows], kind: Kind, config: Config) -> Rows:
    """Concatenate the rows of all sources; rename columns to field names if the sources differ."""
    columns = [
        find_columns(rows.columns(), columns_of(config, kind), kind, rows.name).named_fields()
        for rows in sources
    ]
    if all(named == columns[0] for named in columns):
        return Rows.join(sources, _name(sources))
    renamed = [
        rows.derive(
            "fields",
            records=[
                {field: record.get(column) for field, column in named.items()}
                for record in rows.records
            ],
        )
        for rows, named in zip(sources, columns, strict=True)
    ]
    return Rows.join(renamed, _name(sources))


def _head(config: Config, source: Source | None) -> BaseHead | None:
    return None if source is None else read_head(source, config.model.task)


def read_holdout(
    config: Config, like: Examples | None, source: Source | None = None
) -> tuple[Examples, Examples]:
    """Load the validation and test examples; validation replaces a missing test split.

    Args:
        config: the config of the run, with `data.validation` set.
        like: the training examples; None to take the labels from the validation rows.
        source: the base, as in `read_examples`.

    Raises:
        DataError: rows cannot be used.
    """
    labeling = labeling_of(config.data, _head(config, source)) if like is None else None
    validation = _read_split(config.data.validation, "validation", config, like, labeling)
    like = validation if like is None else like
    return validation, _test(config, like, validation)


def _test(config: Config, like: Examples | None, validation: Examples) -> Examples:
    """Load the test examples: from `data.test`, from the folder of the training rows or the folder
    next to it, else the validation examples.
    """
    options = config.data
    if options.test:
        return _read_split(options.test, "test", config, like)
    folder = Path(options.sources[0]).expanduser()
    siblings = (
        {split: sibling_split(folder, split) for split in ("validation", "test")}
        if folder.is_dir()
        else {}
    )
    if (path := siblings.get("validation")) and not options.validation:
        _log.info(
            "%s: ignoring its validation rows; set data.validation=%s to use them", path, path
        )
    path = siblings.get("test")
    if path is None or len(options.sources) > 1:
        return validation
    _log.info("%s: using its test rows for the final figures", path)
    try:
        return _read_split(str(path), "test", config, like)
    except DataError as error:
        hint = (
            f"{path}: its test rows are used because data.test is not set; set data.test, or name a"
            " file in data.train"
        )
        raise DataError([*error.problems, hint]) from error


def mix(sources: Sequence[Rows], weights: Sequence[float], seed: int) -> list[Rows]:
    """Sample rows from each source in proportion to the weights, as many as possible without
    repeating one.

    Args:
        sources: the rows of each source.
        weights: the share of each source; empty to take all rows.
        seed: the sampling seed.

    Raises:
        ConfigError: a weight is so small that its source would have no rows.
    """
    if not weights:
        return list(sources)
    scale = min(len(rows) / weight for rows, weight in zip(sources, weights, strict=True))
    samples: list[Rows] = []
    for i, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
        count = min(len(rows), round(scale * weight))
        if count == 0:
            raise ConfigError(
                f"data.weights: {weight} selects no row of {rows.name}; increase it, or remove the"
                " source"
            )
        samples.append(
            rows
            if count == len(rows)
            else rows.take(sorted(order(len(rows), seed, i)[:count].tolist()))
        )
        _log.info("%s: %d of %d rows", rows.name, count, len(rows))
    return samples


def recognize(config: Config, rows: Rows, *, log: bool = False) -> tuple[Rows, Kind]:
    """Detect the format of rows, and split texts at `data.separator` into prompt and completion.

    Args:
        config: the config of the run.
        rows: the rows of one source.
        log: whether to log the unused columns.

    Raises:
        ConfigError: `data.format` is set for a task that has only one format.
        DataError: the columns fit no format, or several.
    """
    kind = kind_of(config, rows)
    if log:
        report_unread(config, rows, kind)
    return cut_texts(config, rows, kind)


def report_unread(config: Config, rows: Rows, kind: Kind) -> None:
    """Log the unused columns of a source in one line; as a warning if one may be needed."""
    found = find_columns(rows.columns(), columns_of(config, kind), kind, rows.name)
    text, may_be_needed = find_unread(filled_columns(rows), found, kind)
    if text:
        _log.log(logging.WARNING if may_be_needed else logging.INFO, "%s: %s", rows.name, text)


def cut_texts(
    config: Config, rows: Rows, kind: Kind, columns: Columns | None = None
) -> tuple[Rows, Kind]:
    """Split texts at `data.separator` into prompt and completion, and drop unlabeled rows of a
    classification.

    Args:
        config: the config of the run.
        rows: the rows of one source.
        kind: the format of the rows.
        columns: the columns to use; None for those in the config.

    Returns:
        The rows and their format.

    Raises:
        DataError: a text does not contain the separator, or no row has a label.
    """
    if kind == "classification":
        found = find_columns(rows.columns(), columns or columns_of(config, kind), kind, rows.name)
        return select_labeled(
            rows, found.label or "", config.data.unlabeled, _problem(config)
        ), kind
    if kind == "text" and config.data.separator:
        return split_at(rows, config.data.separator, columns_of(config, kind)), "prompt_completion"
    return rows, kind


def columns_of(config: Config, kind: Kind) -> Columns:
    """Return the columns in the config, without the text column if texts were split."""
    named = config.data.columns
    split = kind == "prompt_completion" and config.data.separator
    return Columns(
        **{field: column for field, column in named.items() if not (split and field == "text")}
    )


def kind_of(config: Config, rows: Rows) -> Kind:
    """Return the format of rows: `data.format`, or inferred from the columns.

    Raises:
        ConfigError: `data.format` is set for a task that has only one format.
        DataError: the columns fit no format, or several, or an unused one may be needed.
    """
    task, kind = config.model.task, config.data.format
    if task in _KINDS:
        if kind != "auto":
            raise ConfigError(
                f"data.format: {kind!r} is for task 'causal_lm', but the task is {task!r}; set it"
                " to 'auto'"
            )
        return _KINDS[task]
    if kind == "auto":
        names, filled, requested = (
            rows.columns(),
            filled_columns(rows),
            Columns(**config.data.columns),
        )
        kind = find_format(names, requested, rows.name, plain_texts(rows, filled))
        found = find_columns(names, requested, kind, rows.name)
        refuse_partial(filled, requested, found, kind, rows.name)
    _log.info("%s: rows of format %s", rows.name, kind)
    return kind


def read_source(path: str, split: str, config: Config) -> Rows:
    """Read the rows of a file, a folder or a hub id.

    Raises:
        DataError: the source cannot be read.
    """
    file_options = file_options_of(config)
    if is_hub_id(path):
        return read_rows(
            path,
            split=split,
            config=config.data.subset,
            revision=config.data.revision,
            file_options=file_options,
        )
    return read_rows(
        path, split=split if Path(path).expanduser().is_dir() else None, file_options=file_options
    )


def file_options_of(config: Config) -> FileOptions:
    """Return the file options in the config."""
    data = config.data
    columns = tuple(data.columns.values())
    max_bytes = round(data.most_gib * GIB)
    return FileOptions(
        data.encoding, data.delimiter, data.quoting, data.header, data.field, columns, max_bytes
    )


def _problem(config: Config) -> ProblemType | None:
    return None if config.data.problem == "auto" else config.data.problem


def _examples(
    rows: Rows,
    kind: Kind,
    config: Config,
    like: Examples | None = None,
    labeling: Labeling | None = None,
) -> Examples:
    return make_examples(
        rows,
        kind=kind,
        problem=_problem(config),
        columns=columns_of(config, kind),
        labels=labeling or (),
        like=like,
    )


def _read_split(
    path: str, split: str, config: Config, like: Examples | None, labeling: Labeling | None = None
) -> Examples:
    """Load another split, with the columns of the training rows if it has them."""
    rows = read_source(path, split, config)
    if config.data.separator:
        return _examples(*recognize(config, rows), config)
    if like is None:
        return _examples(*cut_texts(config, rows, kind_of(config, rows)), config, labeling=labeling)
    names = set(like.columns.named_fields().values())
    same = bool(names) and names <= set(rows.columns())
    if like.kind not in GENERATIVE:
        columns = like.columns if same else columns_of(config, like.kind)
        return make_examples(
            cut_texts(config, rows, like.kind, columns)[0],
            kind=like.kind,
            columns=columns,
            like=like,
        )
    if same:
        return make_examples(rows, kind=like.kind, like=like)
    return _examples(rows, kind_of(config, rows), config)


def _hold_out(rows: Rows, kind: Kind, config: Config) -> tuple[Rows, Rows]:
    share, seed = config.data.validation_share, config.train.seed
    if kind == "text":
        return hold_out_text(rows, share, seed, Columns(**config.data.columns))
    return hold_out(rows, share, seed)


def _sample(rows: Rows, config: Config) -> Rows:
    max_rows = config.data.max_rows
    if max_rows is None or max_rows >= len(rows):
        return rows
    return rows.take(sorted(order(len(rows), config.train.seed)[:max_rows].tolist()))


def _name(sources: Sequence[Rows]) -> str:
    return ", ".join(rows.name for rows in sources)
