"""`base.json` in a run's folder: the SHA-256 of every tensor of the base that the run began with.

The identity of a run says that the base is another; this says which of its tensors, and sees the
head of a base as well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxpeft import atomic
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub.weights import digests
from jaxpeft.json_files import read_json

NAME = "base.json"
_SHOWN = 3
_FIX = (
    "fetch the base again, or where the change is meant, allow it by --allow-base, or give another"
    " --workdir"
)


def find_changes(folder: Path, tensors: Mapping[str, str]) -> list[str]:
    """List what is wrong with the base of a run that is gone on from; empty where nothing is, or
    nothing was recorded.

    Args:
        folder: of the run.
        tensors: the SHA-256 of each tensor of the base, by its name.
    """
    file = folder / NAME
    if not file.is_file():
        return []
    try:
        recorded: Any = read_json(file).get("sha256")
    except WeightsError as error:
        return [
            f"{problem}; remove it, and the base's tensors are not compared one by one"
            for problem in error.problems
        ]
    if not digests.is_record(recorded):
        return [
            (
                f"{file}: must hold the SHA-256 of every tensor by its name; remove it, and they"
                " are not compared one by one"
            )
        ]
    # a name that is not there is no damage: the same weights may be written under other names
    there = {name: recorded[name] for name in recorded if name in tensors}
    wrong = [name for name in sorted(there) if there[name] != tensors[name]]
    more = (
        [f"... and {len(wrong) - _SHOWN} more of {len(tensors)} tensors"]
        if len(wrong) > _SHOWN
        else []
    )
    return [
        *(
            f"base: {name} is not the tensor that the run began with ({file}); {_FIX}"
            for name in wrong[:_SHOWN]
        ),
        *more,
    ]


def require_same(problems: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a base of which tensors have changed.

    Args:
        problems: what `changed` lists.
        allowed: fields that may differ.

    Raises:
        ConfigError: naming the tensors.
    """
    if problems and not any(name in ("base", "base.sha256") for name in allowed):
        raise ConfigError(problems)


def write(folder: Path, tensors: Mapping[str, str]) -> None:
    """Write the record of the base, whole or not at all."""
    atomic.write_text(folder / NAME, json.dumps({"sha256": dict(tensors)}, indent=1) + "\n")
