"""What makes two runs the same run: config, base, data and tree. A changed field is refused, with both values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.core import paths

CHANGEABLE = (
    "config.log.", "config.checkpoint.", "config.evaluation.batch_size", "config.mesh.", "config.data.workers",
    "config.data.worker_timeout",
)  # fmt: skip
"""Fields that may differ between a run and its resumption, by how they begin: they do not touch what is computed."""


def tree_spec(tree: Any) -> dict[str, str]:
    """Gives `{path: "dtype[shape]"}` of a tree of arrays: Orbax would cast a leaf to another dtype in silence."""
    return {paths.text(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths.walk(tree)}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lists every field whose value differs, as `field: was ..., is ...`.

    Args:
        saved: nested plain values, from the checkpoint.
        now: the same of this run.
    """
    old, new = _flat(saved), _flat(now)
    absent = object()
    rows: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, absent), new.get(key, absent)
        if before != after and not key.startswith(CHANGEABLE):
            shown = ["not there" if value is absent else repr(value) for value in (before, after)]
            rows.append(f"{key}: was {shown[0]}, is {shown[1]}")
    if any(row.startswith("config.method.") for row in rows):
        # the leaves differ since the method does
        rows = [row for row in rows if not row.startswith(("tree.", "method."))]
    return rows


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= _flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return out
