"""Which classes a run has, and which of them a cell means."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxpeft.config.schema import DataConfig
from jaxpeft.data.examples.label_checks import DIGITS, Found, canonical_number, plain_text
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
    """How the label column of a run is read: the same for all of its splits.

    Attributes:
        names: the name of each id; empty where the training rows are to tell them.
        origin: who named them in this order, `data.labels` or the `config.json` of a base whose
            head is kept: whole numbers in the rows are then ids. Empty where the rows told them.
        problem: what that `config.json` says of the problem.
        separator: what stands between several labels of one string.
        unlabeled: values that stand for no label, beside -100.
        vectors: whether a row of several labels holds 0 or 1 for each name, in their order.
    """

    names: tuple[str, ...] = ()
    origin: str = ""
    problem: ProblemType | None = None
    separator: str = ""
    unlabeled: tuple[str, ...] = ()
    vectors: bool = False

    @property
    def identity(self) -> list[Any]:
        """What ids are made from, wherever the files that said so lie."""
        return [self.names, bool(self.origin), self.separator, self.unlabeled, self.vectors]

    def cell(self, value: Any) -> Any:
        """Return a cell with a string of several labels as their list."""
        if not self.separator or isinstance(value, list) or value is None:
            return value
        return (
            [part.strip() for part in value.split(self.separator) if part.strip()]
            if isinstance(value, str)
            else [value]
        )

    def problem_of(self, values: Sequence[Any]) -> ProblemType:
        """Return the problem of labels: what the base says where they can be meant so, else what
        they look like.
        """
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
        """Return the id of a label: by its name, or by its number where somebody said the order;
        None where there is none.
        """
        if name in self.names:
            return self.names.index(name)
        given = canonical_number(name)
        if len(self.names) == 2:
            given = {"false": "0", "true": "1"}.get(given, given)
        if not self.origin or not DIGITS.fullmatch(given) or any(map(DIGITS.fullmatch, self.names)):
            return None
        return int(given) if int(given) < len(self.names) else None

    def reader(self, problem: ProblemType | None) -> Callable[[Any], Any]:
        """Return a function from a cell to its id, its ids, or the id of each tag (`problem` None,
        -100 where nothing is learned).

        The function raises `RowError` where the cell is no label, or not one of these.
        """
        ids = {name: self.id_of(name) for name in self.names}

        def known(name: str) -> int:
            found = ids[name] if name in ids else ids.setdefault(name, self.id_of(name))
            if found is None:
                raise self._unknown(name)
            return found

        if problem is None:
            return lambda value: [
                IGNORED if name == NO_LABEL else known(name)
                for name in self.names_of(value, problem)
            ]
        if problem == "single_label":
            return lambda value: known(*self.names_of(value, problem))
        return (
            self._vector
            if self.vectors
            else lambda value: [known(name) for name in self.names_of(value, problem)]
        )

    def names_of(self, value: Any, problem: ProblemType | None) -> list[str]:
        """Return the names that a cell holds; of tags (`problem` None) those of all words, -100
        where nothing is learned.

        Raises:
            RowError: it is no label, no list of labels, or stands for none.
        """
        if problem is None:
            return tag_list(value, self.unlabeled)
        if problem == "multi_label":
            return label_list(self.cell(value))
        name = label_name(value)
        if name == NO_LABEL:
            raise RowError(f"holds {NO_LABEL}, which stands for no label", "leave the row out")
        return [name]

    def seen(self, values: Sequence[Any]) -> Labeling:
        """Return the same, where all cells are vectors of 0 and 1 with these read by position.

        Raises:
            RowError: the vectors have not as many numbers as there are labels.
        """
        cells = [self.cell(value) for value in values if value is not None]
        size = len(cells[0]) if cells and isinstance(cells[0], list) else 0
        if size < 2 or not all(_is_vector(cell, size) for cell in cells):
            return self
        if len(self.names) not in (0, size):
            raise RowError(
                f"holds lists of {size} numbers 0 or 1, and {self.origin} has {len(self.names)}"
                " labels",
                f"give one number for each label, or name the {size} labels in data.labels",
            )
        if not self.names:
            _log.info(
                "labels are lists of %d numbers 0 or 1: read by position; data.labels names them",
                size,
            )
        return dataclasses.replace(self, vectors=True, names=self.names or _numbered_names(size))

    def _vector(self, value: Any) -> list[int]:
        cells = self.cell(value)
        if not _is_vector(cells, len(self.names)):
            raise RowError(
                f"is not a list of {len(self.names)} numbers 0 or 1, as the others are",
                "give one for each label, in order",
            )
        return [i for i, one in enumerate(cells) if int(one)]

    def _unknown(self, name: str) -> RowError:
        where = f" of {self.origin}" if self.origin else ""
        counted = (
            ", which are counted from 0"
            if self.origin and DIGITS.fullmatch(canonical_number(name))
            else ""
        )
        hint = nearest(name, self.names).removeprefix("; ")
        return RowError(
            f"holds {excerpt(name)!r}, which is not one of the {len(self.names)} labels"
            f" known{where}{counted}",
            hint or "correct it or leave it out",
        )


def labeling_of(options: DataConfig, head: BaseHead | None) -> Labeling:
    """Return what a config and the base's head say of the labels, before any row is read.

    Args:
        options: the data options.
        head: of the base, None where it has none.

    Raises:
        ConfigError: `data.labels` names the classes of the head in another order.
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
            f"data.labels: {', '.join(own.names)}, but the base's head, which is kept, has its"
            f" classes in the order {', '.join(head.names)} ({head.file}); write them in that"
            " order, or leave data.labels out"
        )
    if ours != theirs and head.names:
        _log.warning(
            "data.labels: the base's head is kept, and starts as that of the classes %s (%s)",
            ", ".join(head.names),
            head.file,
        )
    return dataclasses.replace(own, problem=head.problem)


def find_labels(
    labeling: Labeling, rows: Rows, column: str, problem: ProblemType | None, *, sure: bool = False
) -> Labeling:
    """Return how the labels of a run are read, told from its training rows.

    Args:
        labeling: what is known.
        rows: the training rows.
        column: with the labels; cells that are no labels are passed over.
        problem: of a classification, not a regression; None for tags.
        sure: whether the user said that it is this problem.

    Raises:
        DataError: labels that one would not tell apart, that stand for none or for several, or that
            the base does not have.
    """
    if labeling.vectors or (labeling.names and labeling.origin == BY_USER):
        return labeling
    found = Found.read(
        rows, column, [_names(record.get(column), problem, labeling) for record in rows.records]
    )
    if labeling.names and _has_all(labeling, found):
        return labeling
    if problem is not None:
        found.refuse_lists(sure or problem == "multi_label")
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
    """Return the rows that have a label; how many have none is logged.

    Args:
        rows: of a classification.
        column: with the labels.
        unlabeled: values that stand for none; but for regression, -100 does as well.
        problem: of the classification, None to tell it from the rows.

    Raises:
        DataError: none has one.
    """
    values = [record.get(column) for record in rows.records]
    number = (problem or guess_problem(values)) == "regression"
    none = tuple(unlabeled) if number else (*unlabeled, NO_LABEL)
    kept = [i for i, value in enumerate(values) if has_label(value, none)]
    if len(kept) == len(rows):
        return rows
    first = rows.where(next(i for i, value in enumerate(values) if not has_label(value, none)))
    said = (
        f"column {column!r}: {len(rows) - len(kept)} of {len(rows)} rows have no label, the first"
        f" is {first}"
    )
    if not kept:
        raise DataError(f"{rows.name}: {said}; give rows that have one")
    _log.warning("%s: %s; they are left out", rows.name, said)
    return rows.take(kept)


def _names(value: Any, problem: ProblemType | None, labeling: Labeling) -> list[str]:
    """Return the names of a cell, none where it is broken: that is told when it is read."""
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


def _has_all(labeling: Labeling, found: Found) -> bool:
    """Return whether a base's head has all labels of the rows; one that only counts its classes has
    those up to its last.
    """
    size = len(labeling.names)
    if any(labeling.id_of(name) is None for name in found.counts):
        return False
    if labeling.names == _numbered_names(size):
        return str(size - 1) in found.counts
    if found.counts and not found.counts.keys() & set(labeling.names):
        order = ", ".join(f"{i} {name}" for i, name in enumerate(labeling.names))
        _log.warning(
            "%s: labels are numbers, taken as the ids of %s: %s", found.name, labeling.origin, order
        )
    return True


def _refuse_for_head(labeling: Labeling, found: Found) -> None:
    """Refuse labels that a base's head, which is kept, does not have; those of another task make a
    head of their own.

    Raises:
        DataError: some labels are the head's and some are not, or the head has as many of other
            names.
    """
    size, names = len(labeling.names), sort_names(found.counts)
    if labeling.names == _numbered_names(size):
        if len(names) == size:
            _log.warning(
                "%s: the head of the base is kept, and %s does not name its classes: they are taken"
                " in the order %s; say another in data.labels",
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
        f"{found.name}: column {found.column!r} has the labels {_list_names(names)}, and the head"
        f" of the base, which is kept, has {_list_names(labeling.names)} ({labeling.origin}):"
        f" {excerpt(missing)!r} is none of them{hint}; write its names or their numbers, or name"
        " your own classes, in the order of the head's where they are the same, in data.labels"
    )
