"""What `make test` tries of a property that holds for many: one of each kind. The others are slow,
for `make test-all`; of alternatives, that tries one in turn, and all with JAXPEFT_TESTS=full.
"""

from __future__ import annotations

import os
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import pytest

METHODS: Mapping[str, str] = {
    "lora": "llama",  # a product of low rank is added
    "oft": "llama",  # the input is multiplied with a matrix
    "ia3": "bert",  # activations are gated
    "vera": "llama",  # sites share leaves
    "prefix": "llama",  # virtual tokens have keys and values
    "prompt": "bert",  # virtual tokens have embeddings
    "adapter houlsby": "bert",  # a bottleneck follows a layer
    "ln_tuning": "llama",  # leaves of the base are trained
    "mixed": "bert",  # several methods at once
}
"""Rows of `tests.conformance.rows`, one for each kind of computation, and the model that each is
tried on.
"""


def both_stacks(test: Any) -> Any:
    """Run a test with unrolled and with scanned layers, in turn if nothing asks for both."""
    scan = pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
    return pytest.mark.alternatives("unrolled", "scanned")(scan(test))


FULL = os.environ.get("JAXPEFT_TESTS") == "full"


def case(name: str, value: Any, *, quick: bool) -> Any:
    """Return a parameter of a test with a name as its id; it is slow unless it is `quick`."""
    return pytest.param(value, id=name, marks=() if quick else pytest.mark.slow)


def mark_others(items: Iterable[pytest.Item]) -> None:
    """Mark as slow what `@pytest.mark.representatives(PATTERN, ...)` of its test does not name.

    A pattern is of the ids of parameters, as pytest shows them in brackets. One that names none of
    them is an error.
    """
    unused: dict[tuple[str, str], bool] = {}
    for item in items:
        if marker := item.get_closest_marker("representatives"):
            test, _, parameters = item.nodeid.removesuffix("]").partition("[")
            named = {pattern: fnmatchcase(parameters, pattern) for pattern in marker.args}
            if not any(named.values()):
                item.add_marker(pytest.mark.slow)
            for pattern, found in named.items():
                unused[test, pattern] = unused.get((test, pattern), True) and not found
    if missing := [f"{test}: {pattern!r}" for (test, pattern), none in unused.items() if none]:
        raise pytest.UsageError("representatives name no parameters of\n  " + "\n  ".join(missing))


def left_out(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """List the tests that `@pytest.mark.alternatives(NAME, NAME, ...)` leaves out.

    Of tests that differ only in which of the names is in their ids, one runs: which one depends on
    the rest of the id, or with `together=True` only on the other parameters, so that all tests of a
    module make the same choice. What `make test` runs is never left out.
    """
    if FULL:
        return []
    groups: dict[tuple[str, str], dict[str, pytest.Item]] = defaultdict(dict)
    for item in items:
        marker = item.get_closest_marker("alternatives")
        if marker is None:
            continue
        for name in marker.args:
            test, _, parameters = item.nodeid.partition("[")
            if name in parameters:
                rest = parameters.replace(name, "*")
                groups[test, rest if marker.kwargs.get("together") else test + rest][name] = item
                break
    out: list[pytest.Item] = []
    for (_, key), found in groups.items():
        turn = sorted(found)[zlib.crc32(key.encode()) % len(found)]
        out += [
            item for name, item in found.items() if name != turn and item.get_closest_marker("slow")
        ]
    return out
