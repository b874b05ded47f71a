"""Find the classes of a run, and map cells to them."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.data_config import DataConfig
from jaxpeft.data.examples.label_checks import DIGITS, LabelCounts, canonical_number, plain_text
from jaxpeft.data.examples.labels import (
    NO_LABEL,
    ProblemType,
    guess_problem,
    has_label,
    label_list,
    label_name,
    number,
    sort_names,
    tag_list,
)
from jaxpeft.data.problems import RowError, excerpt
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import ConfigError, DataError, nearest
from jaxpeft.hub.base_head import BaseHead

_log = logging.getLogger(__name__)
BY_USER = "data.labels"
IGNORED = -100
_SHOWN = 20


@dataclass(frozen=True)
class Labeling:
    """How the label column of a run maps to ids, in all splits.

    Attributes:
        names: label names by id; empty if they are still to be taken from the training rows.
        origin: source of the names: `data.labels`, or the `config.json` of a base whose head is
            kept; integers in the rows are then ids. Empty if the names come from the rows.
        problem: the problem type in that `config.json`.
        separator: the separator between the labels in a string.
        unlabeled: values that mean no label, in addition to -100.
        vectors: whether the cells of multi-label rows are lists of 0 and 1, one per name.
    """

    names: tuple[str, ...] = ()
    origin: str = ""
    problem: ProblemType | None = None
    separator: str = ""
    unlabeled: tuple[str, ...] = ()
    vectors: bool = False

    @property
    def identity(self) -> list[Any]:
        """Everything that determines the ids; independent of file paths."""
        return [self.names, bool(self.origin), self.separator, self.unlabeled, self.vectors]

    def cell(self, value: Any) -> Any:
        """Split a cell with several labels in a string into a list."""
        if not self.separator or isinstance(value, list) or value is None:
            return value
        return (
            [part.strip() for part in value.split(self.separator) if part.strip()]
            if isinstance(value, str)
            else [value]
        )

    def problem_of(self, values: Sequence[Any]) -> ProblemType:
        """Return the problem type of labels: the base's if they fit it, else guessed from them."""
        guessed = "multi_label" if self.separator else guess_problem(values)
        if (
            self.problem == "regression"
            and guessed == "single_label"
            and None not in map(number, values)
        ):
            return "regression"
        if guessed == "regression" and self.origin == BY_USER:
            return "single_label"
        return (
            "multi_label"
            if guessed == "single_label" and self.problem == "multi_label"
            else guessed
        )

    def id_of(self, name: str) -> int | None:
        """Return the id of a label by name, or by number if the order is known; else None."""
        if name in self.names:
            return self.names.index(name)
        digits = canonical_number(name)
        if len(self.names) == 2:
            digits = {"false": "0", "true": "1"}.get(digits, digits)
        if (
            not self.origin
            or not DIGITS.fullmatch(digits)
            or any(map(DIGITS.fullmatch, self.names))
        ):
            return None
        return int(digits) if int(digits) < len(self.names) else None

    def reader(self, problem: ProblemType | None) -> Callable[[Any], Any]:
        """Return a function that maps a cell to its id, its ids, or its tags' ids.

        Tags (`problem` None) that are masked have the id -100. The function raises `RowError` if
        the cell is not a label or is an unknown one.
        """
        ids = {name: self.id_of(name) for name in self.names}

        def lookup(name: str) -> int:
            label_id = ids[name] if name in ids else ids.setdefault(name, self.id_of(name))
            if label_id is None:
                raise self._unknown_label(name)
            return label_id

        if problem is None:
            return lambda value: [
                IGNORED if name == NO_LABEL else lookup(name)
                for name in self.names_of(value, problem)
            ]
        if problem == "single_label":
            return lambda value: lookup(*self.names_of(value, problem))
        return (
            self._vector
            if self.vectors
            else lambda value: [lookup(name) for name in self.names_of(value, problem)]
        )

    def names_of(self, value: Any, problem: ProblemType | None) -> list[str]:
        """Return the label names in a cell; for tags (`problem` None), one per word, -100 if
        masked.

        Raises:
            RowError: the cell is not a label or list of labels, or means no label.
        """
        if problem is None:
            return tag_list(value, self.unlabeled)
        if problem == "multi_label":
            return label_list(self.cell(value))
        name = label_name(value)
        if name == NO_LABEL:
            raise RowError(f"contains {NO_LABEL}, which means no label", "remove the row")
        return [name]

    def with_vectors(self, values: Sequence[Any]) -> Labeling:
        """Return this labeling, with `vectors` set if all cells are lists of 0 and 1.

        Raises:
            RowError: the length of the lists is not the number of labels.
        """
        cells = [self.cell(value) for value in values if value is not None]
        size = len(cells[0]) if cells and isinstance(cells[0], list) else 0
        if size < 2 or not all(_is_vector(cell, size) for cell in cells):
            return self
        if len(self.names) not in (0, size):
            raise RowError(
                f"contains lists of {size} numbers 0 or 1, but {self.origin} has {len(self.names)}"
                " labels",
                f"give one number per label, or name the {size} labels in data.labels",
            )
        if not self.names:
            _log.info(
                "labels are lists of %d numbers 0 or 1, one per class; name the classes in"
                " data.labels",
                size,
            )
        return dataclasses.replace(self, vectors=True, names=self.names or _numbered_names(size))

    def _vector(self, value: Any) -> list[int]:
        cells = self.cell(value)
        if not _is_vector(cells, len(self.names)):
            raise RowError(
                f"is not a list of {len(self.names)} numbers 0 or 1, as in other rows",
                "give one number per label, in order",
            )
        return [i for i, one in enumerate(cells) if int(one)]

    def _unknown_label(self, name: str) -> RowError:
        where = f" of {self.origin}" if self.origin else ""
        numbering = (
            ", which are numbered from 0"
            if self.origin and DIGITS.fullmatch(canonical_number(name))
            else ""
        )
        hint = nearest(name, self.names).removeprefix("; ")
        return RowError(
            f"contains {excerpt(name)!r}, which is not one of the {len(self.names)} known"
            f" labels{where}{numbering}",
            hint or "correct it or remove it",
        )


def labeling_of(options: DataConfig, head: BaseHead | None) -> Labeling:
    """Return the labeling that a config and the base's head define, before any row is read.

    Args:
        options: the data options.
        head: the head of the base, or None.

    Raises:
        ConfigError: `data.labels` has the classes of the head in another order.
    """
    own = Labeling(
        options.labels,
        BY_USER if options.labels else "",
        separator=options.label_separator,
        unlabeled=options.unlabeled,
    )
    if head is None or (own.names and len(own.names) != head.size):
        return own
    if not own.names:
        return dataclasses.replace(
            own,
            names=head.names or _numbered_names(head.size),
            origin=head.file,
            problem=head.problem,
        )
    ours, theirs = list(map(plain_text, own.names)), list(map(plain_text, head.names))
    if ours != theirs and sorted(ours) == sorted(theirs):
        raise ConfigError(
            f"data.labels: {', '.join(own.names)}, but the base's head, which is kept, has the"
            f" class order {', '.join(head.names)} ({head.file}); use that order, or remove"
            " data.labels"
        )
    if ours != theirs and head.names:
        _log.warning(
            "data.labels: the base's head is kept; its weights were trained for the classes %s"
            " (%s)",
            ", ".join(head.names),
            head.file,
        )
    return dataclasses.replace(own, problem=head.problem)


def find_labels(
    labeling: Labeling,
    rows: Rows,
    column: str,
    problem: ProblemType | None,
    *,
    is_set: bool = False,
) -> Labeling:
    """Return the labeling of a run with the label names of its training rows.

    Args:
        labeling: the labeling from the config and the base.
        rows: the training rows.
        column: the label column; cells that are not labels are ignored.
        problem: the problem type of a classification, not regression; None for tags.
        is_set: whether the user set the problem type.

    Raises:
        DataError: labels look the same, seem to mean none or several, or are not in the base's
            head.
    """
    if labeling.vectors or (labeling.names and labeling.origin == BY_USER):
        return labeling
    found = LabelCounts.read(
        rows, column, [_names(record.get(column), problem, labeling) for record in rows.records]
    )
    if labeling.names and _has_all(labeling, found):
        return labeling
    if problem is not None:
        found.refuse_lists(is_set or problem == "multi_label")
        found.refuse_wordless()
        found.warn_of_values(len(rows))
    found.refuse_alike()
    found.refuse_negative()
    if labeling.names:
        _refuse_for_head(labeling, found)
    return dataclasses.replace(labeling, names=sort_names(found.counts), origin="")


def select_labeled(
    rows: Rows, column: str, unlabeled: Sequence[str], problem: ProblemType | None = None
) -> Rows:
    """Return the rows that have a label, and log the number of dropped rows.

    Args:
        rows: the rows of a classification.
        column: the label column.
        unlabeled: values that mean no label; except for regression, so does -100.
        problem: the problem type; None to guess it from the rows.

    Raises:
        DataError: no row has a label.
    """
    values = [record.get(column) for record in rows.records]
    is_regression = (problem or guess_problem(values)) == "regression"
    no_label = tuple(unlabeled) if is_regression else (*unlabeled, NO_LABEL)
    labeled = [i for i, value in enumerate(values) if has_label(value, no_label)]
    if len(labeled) == len(rows):
        return rows
    first = rows.where(next(i for i, value in enumerate(values) if not has_label(value, no_label)))
    text = (
        f"column {column!r}: {len(rows) - len(labeled)} of {len(rows)} rows have no label, the"
        f" first is {first}"
    )
    if not labeled:
        raise DataError(f"{rows.name}: {text}; add labeled rows")
    _log.warning("%s: %s; dropping them", rows.name, text)
    return rows.take(labeled)


def _names(value: Any, problem: ProblemType | None, labeling: Labeling) -> list[str]:
    """Return the names in a cell; an empty list if it is invalid, which is reported later."""
    try:
        return [name for name in labeling.names_of(value, problem) if name != NO_LABEL]
    except RowError:
        return []


def _is_vector(cell: Any, size: int) -> bool:
    return (
        isinstance(cell, list)
        and len(cell) == size
        and all(one in (0, 1, "0", "1") for one in cell)
    )


def _numbered_names(size: int) -> tuple[str, ...]:
    return tuple(map(str, range(size)))


def _list_names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(excerpt, names[:_SHOWN])) + more


def _has_all(labeling: Labeling, found: LabelCounts) -> bool:
    """Return whether a base's head has all labels of the rows.

    For a head with numbers as names, the rows must also have its last class.
    """
    size = len(labeling.names)
    if any(labeling.id_of(name) is None for name in found.counts):
        return False
    if labeling.names == _numbered_names(size):
        return str(size - 1) in found.counts
    if found.counts and not found.counts.keys() & set(labeling.names):
        order = ", ".join(f"{i} {name}" for i, name in enumerate(labeling.names))
        _log.warning(
            "%s: labels are numbers; using them as ids of %s: %s",
            found.name,
            labeling.origin,
            order,
        )
    return True


def _refuse_for_head(labeling: Labeling, found: LabelCounts) -> None:
    """Refuse labels that conflict with the base's head; labels of another task get a new head.

    Raises:
        DataError: only some labels are in the head, or the head has the same number of labels with
            other names.
    """
    size, names = len(labeling.names), sort_names(found.counts)
    if labeling.names == _numbered_names(size):
        if len(names) == size:
            _log.warning(
                "%s: the head of the base is kept, but %s does not name its classes: assuming the"
                " order %s; set another order in data.labels",
                found.name,
                labeling.origin,
                ", ".join(names),
            )
        return
    known = set(map(plain_text, labeling.names))
    if len(names) != size and not any(plain_text(name) in known for name in names):
        return
    missing = next(name for name in names if labeling.id_of(name) is None)
    hint = nearest(missing, labeling.names)
    raise DataError(
        f"{found.name}: column {found.column!r} has the labels {_list_names(names)}, but the head"
        f" of the base, which is kept, has {_list_names(labeling.names)} ({labeling.origin}):"
        f" {excerpt(missing)!r} is not one of them{hint}; use its names or their numbers, or name"
        " your own classes in data.labels, in the head's order if they are the same"
    )
