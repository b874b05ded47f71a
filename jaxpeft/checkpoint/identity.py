"""What makes two runs the same run: config, base, data and tree. A changed field is refused, with
both values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, nearest

CHANGEABLE = (
    "config.log.",
    "config.checkpoint.",
    "config.compare.",
    "config.evaluation.batch_size",
    "config.mesh.",
    "config.data.workers",
    "config.data.worker_timeout",
    "config.data.most_gib",
    "config.model.path",
    "config.model.revision",
    "config.data.train",
    "config.data.validation",
    "config.data.test",
    "config.train.compiled",
    "config.baselines",
    "config.baseline_learning_rates.",  # of earlier versions, which trained other methods first
)
"""Fields, and sections, that may differ between a run and its resumption: they do not touch what is
computed. What lies at a path does: it is compared by its hash, wherever it lies.
"""
_CAUSES = {
    "data.tokens.": (
        "config.data.",
        "config.train.seed",
        "data.sources.",
        "data.tokenizer",
        "data.template",
    ),
    "data.sources.": ("config.data.subset", "config.data.streaming"),
    "data.template": ("data.tokenizer", "config.data.chat_template"),
    "tree.": ("config.method.",),
    "method.": ("config.method.",),
    "steps": ("config.train.", "config.data."),
}
"""What differs only since something else does is no news."""
_EARLIER = (
    " (an earlier version of jaxpeft wrote it, another way; give --allow-base if the base is the"
    " same)"
)


def tree_spec(tree: Any) -> dict[str, str]:
    """Return `{path: "dtype[shape]"}` of a tree of arrays: Orbax would cast a leaf to another dtype
    in silence.
    """
    return {paths.text(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths.walk(tree)}


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """List every field whose value differs, as `field: was ..., is ...`.

    Args:
        saved: nested plain values, from the checkpoint.
        now: the same of this run.
        allowed: fields that may differ, by their name or how it begins, with or without `config.`.

    Returns:
        `(those that may not differ, those that are allowed to)`. The leaves' shapes can never be
        allowed to.

    Raises:
        ConfigError: a name in `allowed` is no field.
    """
    earlier = "config" not in saved.get(
        "base", {"config": {}}
    )  # it was hashed with the weights, as it was spelled
    if earlier:
        now = {**now, "base": {"sha256": now["base"]["sha256"]}}
    old, new = _fields(saved), _fields(now)
    absent = object()
    changed: dict[str, str] = {}
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key, absent), new.get(key, absent)
        if before != after and not any(
            key == field or (key.startswith(field) and field[-1] == ".") for field in CHANGEABLE
        ):
            shown = ["not there" if value is absent else repr(value) for value in (before, after)]
            changed[key] = f"{key}: was {shown[0]}, is {shown[1]}" + _EARLIER * (
                earlier and key == "base.sha256"
            )
    let = {key for key in old.keys() | new.keys() if any(_names(name, key) for name in allowed)}
    unknown = [
        name for name in allowed if not any(_names(name, key) for key in old.keys() | new.keys())
    ]
    if unknown:
        raise ConfigError(
            [f"--allow-change={name}: no such field{nearest(name, old)}" for name in unknown]
        )
    causes = {kind: [key for key in changed if key.startswith(of)] for kind, of in _CAUSES.items()}
    refused: list[str] = []
    for key, row in changed.items():
        cause = next((found for kind, found in causes.items() if key.startswith(kind)), [])
        if key not in let and (not cause or (key.startswith("tree.") and set(cause) <= let)):
            refused.append(row)
    return refused, [row for key, row in changed.items() if key in let]


def _names(name: str, key: str) -> bool:
    return any(key == full or key.startswith(f"{full}.") for full in (name, f"config.{name}"))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values by their paths, tuples as JSON has them."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in paths.flatten(values).items()
    }
