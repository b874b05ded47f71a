"""Compare the identities of two runs (config, base, data and tree), field by field."""

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
    "config.baseline_learning_rates.",  # from earlier versions, which trained other methods first
)
"""Fields and sections that may differ on resume, since they do not affect the computation. Files
are compared by hash, so their paths may differ.
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
"""Fields that change as a consequence of others, and are then not reported."""
_EARLIER = (
    " (an earlier version of jaxpeft computed it differently; pass --allow-base if the base is"
    " unchanged)"
)


def tree_spec(tree: Any) -> dict[str, str]:
    """Return `{path: "dtype[shape]"}` of a tree, since Orbax would silently cast dtypes."""
    return {paths.text(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in paths.walk(tree)}


def differences(
    saved: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """List every field whose value differs, as `field: was ..., is ...`.

    Args:
        saved: nested plain values from the checkpoint.
        now: nested plain values of this run.
        allowed: fields or sections that may differ, with or without `config.`.

    Returns:
        `(rejected differences, allowed differences)`. Shapes of leaves are always rejected.

    Raises:
        ConfigError: a name in `allowed` is not a field.
    """
    # an earlier version hashed the config with the weights
    earlier = "config" not in saved.get("base", {"config": {}})
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
            shown = ["missing" if value is absent else repr(value) for value in (before, after)]
            changed[key] = f"{key}: was {shown[0]}, is {shown[1]}" + _EARLIER * (
                earlier and key == "base.sha256"
            )
    permitted = {
        key for key in old.keys() | new.keys() if any(_names(name, key) for name in allowed)
    }
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
        if key not in permitted and (
            not cause or (key.startswith("tree.") and set(cause) <= permitted)
        ):
            refused.append(row)
    return refused, [row for key, row in changed.items() if key in permitted]


def _names(name: str, key: str) -> bool:
    return any(key == full or key.startswith(f"{full}.") for full in (name, f"config.{name}"))


def _fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested values by path, with tuples as lists."""
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in paths.flatten(values).items()
    }
