"""What is doubtful of the labels that rows hold: refused, or warned of, with the option that says
what is meant.
"""

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
_MANY = 20


def canonical_number(name: str) -> str:
    """Return `1.0` and `01` as `1`, other names as they are."""
    match = _WHOLE.fullmatch(name)
    return match[1] + match[2] if match else name


def plain_text(name: str) -> str:
    """Return a name without how it is written: case, spaces, what joins its words, zeros before a
    number, the form of characters.
    """
    composed = unicodedata.normalize("NFKC", name)
    seen = "".join(one for one in composed if unicodedata.category(one) != "Cf")
    return unicodedata.normalize(
        "NFKC", _BETWEEN.sub(" ", canonical_number(seen.strip())).casefold()
    )


@dataclass(frozen=True)
class Found:
    """The labels that rows hold.

    Attributes:
        name: of the rows.
        column: with the labels.
        counts: how often each label is there.
        first: where each is first.
    """

    name: str
    column: str
    counts: Mapping[str, int]
    first: Mapping[str, str]

    @staticmethod
    def read(rows: Rows, column: str, names: Sequence[Sequence[str]]) -> Found:
        """Count labels.

        Args:
            rows: which hold them.
            column: in which they are.
            names: of each row.
        """
        counts = Counter(name for of_row in names for name in of_row)
        first: dict[str, int] = {}
        for i, of_row in enumerate(names):
            for name in of_row:
                first.setdefault(name, i)
        return Found(rows.name, column, counts, {name: rows.where(i) for name, i in first.items()})

    def count_of(self, name: str) -> str:
        """Return a label with how often it is there, and where first."""
        times = "once, in" if self.counts[name] == 1 else f"{self.counts[name]} times, first in"
        return f"{excerpt(ascii(name))} ({times} {self.first[name]})"

    def refuse_alike(self) -> None:
        """Refuse labels that one would not tell apart, and the same truth written in two ways."""
        groups: dict[str, list[str]] = {}
        for name in self.counts:
            groups.setdefault(_TRUTHS.get(plain_text(name), plain_text(name)), []).append(name)
        if alike := [
            " and ".join(map(self.count_of, names)) for names in groups.values() if len(names) > 1
        ]:
            raise DataError(
                f"{self.name}: column {self.column!r} has labels that differ only in how they are"
                f" written: {'; '.join(alike[:5])}; write them alike, or name each in data.labels"
                " if they are different classes"
            )

    def refuse_lists(self, sure: bool) -> None:
        """Refuse strings that look like several labels, unless they are surely one each."""
        for separator in () if sure else _SEPARATORS:
            parts = {
                name: [part.strip() for part in name.split(separator)]
                for name in self.counts
                if separator in name.strip()
            }
            several = {name: of for name, of in parts.items() if len(of) > 1 and all(of)}
            doubtful = [name for name, of in several.items() if all(map(DIGITS.fullmatch, of))]
            if separator != " ":  # which stands inside of names
                doubtful += [name for name, of in several.items() if set(of) <= self.counts.keys()]
                shared = len({part for of in several.values() for part in of}) <= len(several)
                doubtful += several if shared and len(several) > 1 else []
            if doubtful:
                raise DataError(self._several(doubtful[0], separator))
        bracketed = [
            name for name in self.counts if re.fullmatch(r"\s*[\[{(].*[\]})]\s*", name, re.DOTALL)
        ]
        if bracketed and not sure:
            raise DataError(self._several(bracketed[0], ","))

    def _several(self, name: str, separator: str) -> str:
        bare = "written without brackets and quotes, " if re.match(r"\s*[\[{(]", name) else ""
        point = "; write decimal numbers with a point" if separator == "," else ""
        return (
            f"{self.name}: column {self.column!r} holds {self.count_of(name)}, which looks like"
            f" several labels; {bare}they are told apart by data.label_separator={separator!r}; if"
            f" it is one label, set data.problem='single_label'{point}"
        )

    def refuse_wordless(self) -> None:
        """Refuse a class without a letter or digit among words: it mostly means that there is no
        label.
        """
        wordless = [name for name in self.counts if not any(map(str.isalnum, name))]
        if wordless and any(any(map(str.isalpha, name)) for name in self.counts):
            raise DataError(self._unlabeled(wordless[0], "beside words mostly stands for no label"))
        for name in self.counts:
            if name.strip().lower() in _NONE:
                _log.warning("%s", self._unlabeled(name, "is taken for a class"))

    def warn_of_values(self, rows: int) -> None:
        """Warn of classes that are rather numbers or texts."""
        decimal = [
            name
            for name in self.counts
            if (value := number(name)) is not None and not value.is_integer()
        ]
        other = [name for name in self.counts if number(name) is None]
        if decimal and other:
            _log.warning(
                "%s: column %r: %s is a decimal number, %s is none, so that all are names of"
                " classes; set data.problem='regression' if they are numbers",
                self.name,
                self.column,
                self.count_of(decimal[0]),
                self.count_of(other[0]),
            )
        elif len(self.counts) > max(_MANY, rows // 2):
            _log.warning(
                "%s: column %r has %d different labels in %d rows, such as %s; name another column"
                " in data.columns if they are no classes",
                self.name,
                self.column,
                len(self.counts),
                rows,
                self.count_of(next(iter(self.counts))),
            )

    def refuse_negative(self) -> None:
        """Refuse -1 among classes that are counted from 0: it mostly means that there is no
        label.
        """
        others = set(self.counts) - {"-1"}
        if (
            "-1" not in self.counts
            or not all(map(DIGITS.fullmatch, others))
            or others == {"1"}
            or not others
        ):
            return
        if others in ({"0"}, {"0", "1"}):
            _log.warning("%s", self._unlabeled("-1", "is taken for a class"))
        else:
            raise DataError(
                self._unlabeled("-1", "beside classes counted from 0 mostly stands for no label")
            )

    def _unlabeled(self, name: str, said: str) -> str:
        return (
            f"{self.name}: column {self.column!r}: {self.count_of(name)} {said}; if it means none,"
            f" set data.unlabeled=({excerpt(name)!r},), if it is a class, name all classes in"
            " data.labels"
        )
