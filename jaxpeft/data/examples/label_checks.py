"""Checks for ambiguous labels: refuse them or warn, and name the option that resolves them."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxpeft.data.examples.labels import number
from jaxpeft.data.problems import excerpt
from jaxpeft.data.rows.read import Rows
from jaxpeft.errors import DataError

_log = logging.getLogger(__name__)
DIGITS = re.compile(r"[0-9]+")
_SEPARATORS = (",", ";", "|", " ")
_WHOLE = re.compile(r"(-?)0*([0-9]+)(?:\.0+)?")
_BETWEEN = re.compile(r"(?<=[^\W_])[\s_-]+(?=[^\W_])")
_TRUTHS = {"false": "0", "no": "0", "true": "1", "yes": "1"}
_NONE = frozenset({"n/a", "na", "nan", "null", "unlabeled", "unlabelled"})
_MANY_CLASSES = 20


def canonical_number(name: str) -> str:
    """Return `1.0` and `01` as `1`, and other names unchanged."""
    match = _WHOLE.fullmatch(name)
    return match[1] + match[2] if match else name


def plain_text(name: str) -> str:
    """Return a name normalized for comparison: case, spaces, word separators, leading zeros and
    Unicode form.
    """
    composed = unicodedata.normalize("NFKC", name)
    visible = "".join(one for one in composed if unicodedata.category(one) != "Cf")
    return unicodedata.normalize(
        "NFKC", _BETWEEN.sub(" ", canonical_number(visible.strip())).casefold()
    )


@dataclass(frozen=True)
class LabelCounts:
    """The labels in some rows.

    Attributes:
        name: the name of the rows.
        column: the label column.
        counts: the number of times that each label occurs.
        first: the location of each label's first occurrence.
    """

    name: str
    column: str
    counts: Mapping[str, int]
    first: Mapping[str, str]

    @staticmethod
    def read(rows: Rows, column: str, names: Sequence[Sequence[str]]) -> LabelCounts:
        """Count labels.

        Args:
            rows: the rows.
            column: the label column.
            names: the label names of each row.
        """
        counts = Counter(name for of_row in names for name in of_row)
        first: dict[str, int] = {}
        for i, of_row in enumerate(names):
            for name in of_row:
                first.setdefault(name, i)
        where = {name: rows.where(i) for name, i in first.items()}
        return LabelCounts(rows.name, column, counts, where)

    def count_of(self, name: str) -> str:
        """Return a label with its number of occurrences and the first location."""
        times = "once, in" if self.counts[name] == 1 else f"{self.counts[name]} times, first in"
        return f"{excerpt(ascii(name))} ({times} {self.first[name]})"

    def refuse_alike(self) -> None:
        """Refuse labels that look the same, and different spellings of true or false."""
        groups: dict[str, list[str]] = {}
        for name in self.counts:
            groups.setdefault(_TRUTHS.get(plain_text(name), plain_text(name)), []).append(name)
        if alike := [
            " and ".join(map(self.count_of, names)) for names in groups.values() if len(names) > 1
        ]:
            raise DataError(
                f"{self.name}: column {self.column!r} has labels that differ only in spelling:"
                f" {'; '.join(alike[:5])}; use one spelling, or name each in data.labels if they"
                " are different classes"
            )

    def refuse_lists(self, is_single: bool) -> None:
        """Refuse strings that look like several labels, unless each is known to be one."""
        for separator in () if is_single else _SEPARATORS:
            parts = {
                name: [part.strip() for part in name.split(separator)]
                for name in self.counts
                if separator in name.strip()
            }
            several = {name: of for name, of in parts.items() if len(of) > 1 and all(of)}
            doubtful = [name for name, of in several.items() if all(map(DIGITS.fullmatch, of))]
            if separator != " ":  # spaces are common inside names
                doubtful += [name for name, of in several.items() if set(of) <= self.counts.keys()]
                shared = len({part for of in several.values() for part in of}) <= len(several)
                doubtful += several if shared and len(several) > 1 else []
            if doubtful:
                raise DataError(self._several(doubtful[0], separator))
        bracketed = [
            name for name in self.counts if re.fullmatch(r"\s*[\[{(].*[\]})]\s*", name, re.DOTALL)
        ]
        if bracketed and not is_single:
            raise DataError(self._several(bracketed[0], ","))

    def _several(self, name: str, separator: str) -> str:
        bare = "remove brackets and quotes and " if re.match(r"\s*[\[{(]", name) else ""
        point = "; write decimal numbers with a point" if separator == "," else ""
        return (
            f"{self.name}: column {self.column!r} contains {self.count_of(name)}, which looks like"
            f" several labels; if so, {bare}set data.label_separator={separator!r}; if it is one"
            f" label, set data.problem='single_label'{point}"
        )

    def refuse_wordless(self) -> None:
        """Refuse a class without letters or digits among words: it usually means no label."""
        wordless = [name for name in self.counts if not any(map(str.isalnum, name))]
        if wordless and any(any(map(str.isalpha, name)) for name in self.counts):
            raise DataError(self._unlabeled(wordless[0], "among words usually means no label"))
        for name in self.counts:
            if name.strip().lower() in _NONE:
                _log.warning("%s", self._unlabeled(name, "is used as a class"))

    def warn_of_values(self, rows: int) -> None:
        """Warn if the classes look like numbers or texts."""
        decimal = [
            name
            for name in self.counts
            if (value := number(name)) is not None and not value.is_integer()
        ]
        other = [name for name in self.counts if number(name) is None]
        if decimal and other:
            _log.warning(
                "%s: column %r: %s is a decimal number but %s is not, so all are used as class"
                " names; set data.problem='regression' if they are numbers",
                self.name,
                self.column,
                self.count_of(decimal[0]),
                self.count_of(other[0]),
            )
        elif len(self.counts) > max(_MANY_CLASSES, rows // 2):
            _log.warning(
                "%s: column %r has %d different labels in %d rows, such as %s; if they are not"
                " classes, set the label column in data.columns",
                self.name,
                self.column,
                len(self.counts),
                rows,
                self.count_of(next(iter(self.counts))),
            )

    def refuse_negative(self) -> None:
        """Refuse -1 among classes numbered from 0: it usually means no label."""
        others = set(self.counts) - {"-1"}
        if (
            "-1" not in self.counts
            or not all(map(DIGITS.fullmatch, others))
            or others == {"1"}
            or not others
        ):
            return
        if others in ({"0"}, {"0", "1"}):
            _log.warning("%s", self._unlabeled("-1", "is used as a class"))
        else:
            raise DataError(
                self._unlabeled("-1", "among classes numbered from 0 usually means no label")
            )

    def _unlabeled(self, name: str, fault: str) -> str:
        return (
            f"{self.name}: column {self.column!r}: {self.count_of(name)} {fault}; if it means no"
            f" label, set data.unlabeled=({excerpt(name)!r},); if it is a class, name all classes"
            " in data.labels"
        )
