"""`base.json` in a run's folder: the SHA-256 of every tensor of the base at the start of the run.

A run's identity shows that the base has changed; this file shows which tensors, including those of
the base's head.
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
    "download the base again, or, if the change is intended, pass --allow-base or another --workdir"
)


def find_changes(folder: Path, tensors: Mapping[str, str]) -> list[str]:
    """List the problems with the base of a resumed run; empty if nothing was recorded.

    Args:
        folder: folder of the run.
        tensors: SHA-256 of each tensor of the base, by name.
    """
    file = folder / NAME
    if not file.is_file():
        return []
    try:
        recorded: Any = read_json(file).get("sha256")
    except WeightsError as error:
        return [
            f"{problem}; remove it to skip the check of each base tensor"
            for problem in error.problems
        ]
    if not digests.is_record(recorded):
        return [
            (
                f"{file}: must contain the SHA-256 of every tensor by name; remove it to skip the"
                " check of each base tensor"
            )
        ]
    # a missing name is no error: the same weights may be saved under other names
    shared = {name: recorded[name] for name in recorded if name in tensors}
    wrong = [name for name in sorted(shared) if shared[name] != tensors[name]]
    more = (
        [f"... and {len(wrong) - _SHOWN} more of {len(tensors)} tensors"]
        if len(wrong) > _SHOWN
        else []
    )
    return [
        *(
            f"base: tensor {name} has changed since the run started ({file}); {_FIX}"
            for name in wrong[:_SHOWN]
        ),
        *more,
    ]


def require_same(problems: Sequence[str], allowed: Sequence[str]) -> None:
    """Reject a base with changed tensors.

    Args:
        problems: result of `find_changes`.
        allowed: fields that may differ.

    Raises:
        ConfigError: names the tensors.
    """
    if problems and not any(name in ("base", "base.sha256") for name in allowed):
        raise ConfigError(problems)


def write(folder: Path, tensors: Mapping[str, str]) -> None:
    """Write the record of the base atomically."""
    atomic.write_text(folder / NAME, json.dumps({"sha256": dict(tensors)}, indent=1) + "\n")
