"""One export: what it works on, what it reports, and the interface of a target."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.export.request import ExportRequest
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder
from jaxpeft.hub.loading import Outline


@dataclass(frozen=True)
class Report:
    """The result of an export.

    Attributes:
        lines: text for the terminal: the output, its size, the errors, how to load it.
        gap: largest difference of logits on the probe batch.
        error: error of a merge, `||merged - exact|| / ||exact - base||` over all changed weights.
        change: largest difference of logits between the adapter and its base on the probe batch.
    """

    lines: tuple[str, ...]
    gap: float
    error: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class Job:
    """The input of an export: an adapter loaded into its base.

    Attributes:
        request: the request.
        adapter: the adapter's folder.
        outline: outline of the base.
        base: parameters of the base; a target may empty it to save memory.
        method: method of the adapter.
        params: the base with the adapter, which shares the base's arrays.
    """

    request: ExportRequest
    adapter: AdapterFolder
    outline: Outline
    base: Tree
    method: Method
    params: Tree


@dataclass(frozen=True)
class Target:
    """An output format: one value of `--to`.

    Attributes:
        holds: what it can hold, for the documentation.
        require: raises an error if it cannot hold an adapter, before weights are read.
        export: writes the files into a folder, reads them again, and compares their logits.
    """

    holds: str
    require: Callable[[ExportRequest, AdapterFolder, Outline], None]
    export: Callable[[Job, Path], Report]


def size_of(folder: Path, weights: Sequence[str]) -> str:
    """Return the size of a folder and the names of its weight files, for a report."""
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    unit = next(((n, name) for n, name in ((1e9, "GB"), (1e6, "MB")) if size >= n), (1e3, "kB"))
    return f"{size / unit[0]:.1f} {unit[1]}, weights in {', '.join(weights)}"
