"""From the data options of a config to the examples of three splits: sources read, drawn, held out
and mixed.
"""

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
    """Read the rows of the three splits; the validation split stands for a test split that is not
    given.

    Args:
        config: of the run.
        source: the base, whose head may name the classes; None where its files are not at hand.

    Raises:
        ConfigError: an option does not fit the rows.
        DataError: rows cannot be used.
    """
    options = config.data
    told = [
        recognize(config, read_source(path, "train", config), tell=True) for path in options.sources
    ]
    sources = [rows for rows, _ in told]
    kinds: list[Kind] = [kind for _, kind in told]
    # labels are those of all rows: which of them are drawn to be trained on or held out must not
    # change the classes
    whole = None
    if kinds[0] not in GENERATIVE:
        labeling = labeling_of(config.data, _head(config, source))
        whole = _examples(
            _join_sources(sources, kinds[0], config), kinds[0], config, labeling=labeling
        )
    sources = [_draw(rows, config) for rows in sources]
    held: list[Rows] = []
    if not options.validation:
        pairs = [_hold_out(rows, kind, config) for rows, kind in zip(sources, kinds, strict=True)]
        sources, held = [kept for kept, _ in pairs], [out for _, out in pairs]
    sources = mix(sources, options.weights, config.train.seed)
    train = join(
        [_examples(rows, kind, config, whole) for rows, kind in zip(sources, kinds, strict=True)]
    )
    if not held:
        return train, *read_held(config, whole or train)
    validation = join(
        [_examples(rows, kind, config, whole) for rows, kind in zip(held, kinds, strict=True)]
    )
    return train, validation, _test(config, whole or train, validation)


def _join_sources(sources: Sequence[Rows], kind: Kind, config: Config) -> Rows:
    """Put the rows of all sources behind one another; where their columns have other names, under
    the names of the fields.
    """
    found = [
        find_columns(rows.columns(), columns_of(config, kind), kind, rows.name).named_fields()
        for rows in sources
    ]
    if all(of == found[0] for of in found):
        return Rows.join(sources, _name(sources))
    renamed = [
        rows.derive(
            "fields",
            records=[
                {field: record.get(column) for field, column in of.items()}
                for record in rows.records
            ],
        )
        for rows, of in zip(sources, found, strict=True)
    ]
    return Rows.join(renamed, _name(sources))


def _head(config: Config, source: Source | None) -> BaseHead | None:
    return None if source is None else read_head(source, config.model.task)


def read_held(
    config: Config, like: Examples | None, source: Source | None = None
) -> tuple[Examples, Examples]:
    """Read the validation and the test rows; the first stand for a test split that is not given.

    Args:
        config: of the run, with validation rows.
        like: the training examples; None where the validation rows are to tell the labels.
        source: the base, as in `read_examples`.

    Raises:
        DataError: rows cannot be used.
    """
    labeling = labeling_of(config.data, _head(config, source)) if like is None else None
    validation = _other(config.data.validation, "validation", config, like, labeling)
    like = validation if like is None else like
    return validation, _test(config, like, validation)


def _test(config: Config, like: Examples | None, validation: Examples) -> Examples:
    """Read the test rows: those that are named, or in the folder of the training rows or beside it,
    else the validation rows.
    """
    options = config.data
    if options.test:
        return _other(options.test, "test", config, like)
    folder = Path(options.sources[0]).expanduser()
    beside = (
        {split: sibling_split(folder, split) for split in ("validation", "test")}
        if folder.is_dir()
        else {}
    )
    if (path := beside.get("validation")) and not options.validation:
        _log.info(
            "%s: has validation rows, which are not used; data.validation=%s takes them", path, path
        )
    path = beside.get("test")
    if path is None or len(options.sources) > 1:
        return validation
    _log.info("%s: its test rows are taken for the final figures", path)
    try:
        return _other(str(path), "test", config, like)
    except DataError as error:
        why = (
            f"{path}: its test rows are taken since data.test is not set; name others there, or a"
            " file in data.train"
        )
        raise DataError([*error.problems, why]) from error


def mix(sources: Sequence[Rows], weights: Sequence[float], seed: int) -> list[Rows]:
    """Take rows of each source in the proportion of the weights: as many as there can be without
    one taken twice.

    Args:
        sources: rows of each source.
        weights: share of each source; empty to take all rows.
        seed: of the draw.

    Raises:
        ConfigError: so few rows of a source are asked for that it would have none.
    """
    if not weights:
        return list(sources)
    scale = min(len(rows) / weight for rows, weight in zip(sources, weights, strict=True))
    taken: list[Rows] = []
    for i, (rows, weight) in enumerate(zip(sources, weights, strict=True)):
        count = min(len(rows), round(scale * weight))
        if count == 0:
            raise ConfigError(
                f"data.weights: {weight} leaves no row of {rows.name}; raise it, or leave the"
                " source out"
            )
        taken.append(
            rows
            if count == len(rows)
            else rows.take(sorted(order(len(rows), seed, i)[:count].tolist()))
        )
        _log.info("%s: %d of %d rows", rows.name, count, len(rows))
    return taken


def recognize(config: Config, rows: Rows, *, tell: bool = False) -> tuple[Rows, Kind]:
    """Return rows with their format; texts that hold the separator become prompts with completions.

    Args:
        config: of the run.
        rows: of one source.
        tell: whether to log which columns are not read.

    Raises:
        ConfigError: a format is named where the task has only one.
        DataError: the columns fit no format, or several.
    """
    kind = kind_of(config, rows)
    if tell:
        report_unread(config, rows, kind)
    return cut_texts(config, rows, kind)


def report_unread(config: Config, rows: Rows, kind: Kind) -> None:
    """Log, in one line, which columns of a source are not read; a warning where one may be
    missed.
    """
    found = find_columns(rows.columns(), columns_of(config, kind), kind, rows.name)
    told, missed = find_unread(filled_columns(rows), found, kind)
    if told:
        _log.log(logging.WARNING if missed else logging.INFO, "%s: %s", rows.name, told)


def cut_texts(
    config: Config, rows: Rows, kind: Kind, columns: Columns | None = None
) -> tuple[Rows, Kind]:
    """Return rows of a format with their format; texts that hold the separator become prompts with
    completions.

    Rows of a classification that have no label are left out.

    Args:
        config: of the run.
        rows: of one source.
        kind: their format.
        columns: to use, None for those that the config names.

    Raises:
        DataError: a text does not hold the separator, or no row has a label.
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
    """Return the columns that the config names; of texts that were cut, the text has none any
    more.
    """
    named = config.data.columns
    cuts = kind == "prompt_completion" and config.data.separator
    return Columns(
        **{field: column for field, column in named.items() if not (cuts and field == "text")}
    )


def kind_of(config: Config, rows: Rows) -> Kind:
    """Return the format of rows, told from their columns where the config does not name it.

    Raises:
        ConfigError: a format is named where the task has only one.
        DataError: the columns fit no format, or several, or say more than would be learned.
    """
    task, given = config.model.task, config.data.format
    if task in _KINDS:
        if given != "auto":
            raise ConfigError(
                f"data.format: {given!r} is for task 'causal_lm', task is {task!r}; set it to"
                " 'auto'"
            )
        return _KINDS[task]
    kind = given
    if kind == "auto":
        present, held, asked = rows.columns(), filled_columns(rows), Columns(**config.data.columns)
        kind = find_format(present, asked, rows.name, plain_texts(rows, held))
        refuse_partial(held, asked, find_columns(present, asked, kind, rows.name), kind, rows.name)
    _log.info("%s: rows of format %s", rows.name, kind)
    return kind


def read_source(path: str, split: str, config: Config) -> Rows:
    """Read the rows of a file, a folder or a hub id.

    Raises:
        DataError: it cannot be read.
    """
    layout = layout_of(config)
    if is_hub_id(path):
        return read_rows(
            path,
            split=split,
            config=config.data.subset,
            revision=config.data.revision,
            layout=layout,
        )
    return read_rows(path, split=split if Path(path).expanduser().is_dir() else None, layout=layout)


def layout_of(config: Config) -> FileOptions:
    """Return what the config says of data files."""
    data = config.data
    columns = tuple(data.columns.values())
    most = round(data.most_gib * GIB)
    return FileOptions(
        data.encoding, data.delimiter, data.quoting, data.header, data.field, columns, most
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


def _other(
    path: str, split: str, config: Config, like: Examples | None, labeling: Labeling | None = None
) -> Examples:
    """Read another split; its columns are those of the training rows, or found as theirs were."""
    rows = read_source(path, split, config)
    if config.data.separator:
        return _examples(*recognize(config, rows), config)
    if like is None:
        return _examples(*cut_texts(config, rows, kind_of(config, rows)), config, labeling=labeling)
    columns = set(like.columns.named_fields().values())
    same = bool(columns) and columns <= set(rows.columns())
    if like.kind not in GENERATIVE:
        own = like.columns if same else columns_of(config, like.kind)
        return make_examples(
            cut_texts(config, rows, like.kind, own)[0], kind=like.kind, columns=own, like=like
        )
    if same:
        return make_examples(rows, kind=like.kind, like=like)
    return _examples(rows, kind_of(config, rows), config)


def _hold_out(rows: Rows, kind: Kind, config: Config) -> tuple[Rows, Rows]:
    share, seed = config.data.validation_share, config.train.seed
    if kind == "text":
        return hold_out_text(rows, share, seed, Columns(**config.data.columns))
    return hold_out(rows, share, seed)


def _draw(rows: Rows, config: Config) -> Rows:
    most = config.data.max_rows
    if most is None or most >= len(rows):
        return rows
    return rows.take(sorted(order(len(rows), config.train.seed)[:most].tolist()))


def _name(sources: Sequence[Rows]) -> str:
    return ", ".join(rows.name for rows in sources)
