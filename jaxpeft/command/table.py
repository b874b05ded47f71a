"""The commands of the package."""

from __future__ import annotations

from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, str]] = {
    "train": ("jaxpeft.train", "RunArguments"),
    "compare": ("jaxpeft.compare", "RunArguments"),
    "data": ("jaxpeft.data.__main__", "DataArguments"),
    "plan": ("jaxpeft.plan", "PlanArguments"),
    "export": ("jaxpeft.export", "ExportArguments"),
}
"""The module of each command, and the class of its arguments there."""
