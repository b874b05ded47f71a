"""The model card of an adapter folder: what it is, what its outputs are, and how it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jaxpeft
from jaxpeft.core.method import Method
from jaxpeft.hub.adapters.folder_layout import CONFIG, FolderLayout
from jaxpeft.hub.adapters.settings import Settings


def known_elsewhere(method: Method, layout: FolderLayout) -> bool:
    """Return whether the library of the layout has the method, so that it can load the folder."""
    return method.peft.type is not None or layout.name != "peft"


def text(
    method: Method, layout: FolderLayout, config: Mapping[str, Any], settings: Settings
) -> str:
    """Return the model card.

    Args:
        method: what was trained.
        layout: of the folder.
        config: the content of `adapter_config.json`.
        settings: of the run.
    """
    base = config["base_model_name_or_path"]
    elsewhere = known_elsewhere(method, layout)
    head = (
        f"---\nlibrary_name: {layout.name if elsewhere else 'jaxpeft'}\nbase_model: {base}\ntags:"
        f" [jaxpeft, {method.name}]\n---\n\n"
    )
    what = f"# {method.name} adapter for {base}\n\nTrained with jaxpeft {jaxpeft.__version__}; "
    files = f"`{CONFIG}` and `{layout.weights}`"
    if elsewhere:
        return (
            f"{head}{what}{files} are in the file format of"
            f" {layout.library}.\n{layout.usage}{_outputs(settings)}"
        )
    return (
        f"{head}{what.replace(' adapter for ', ' weights for ')}{files} hold all that was trained"
        f" of the base's own weights and of its head. {layout.library} has no method"
        f" {method.name!r}: jaxpeft loads them (`jaxpeft.load_adapter`), or writes a whole model of"
        f" them (`python -m jaxpeft.export --to merged`).\n{_outputs(settings)}"
    )


def _outputs(settings: Settings) -> str:
    rows = [f"problem type: {settings.problem_type}"] if settings.problem_type else []
    rows += [f"outputs, in order: {', '.join(settings.labels)}"] if settings.labels else []
    return "".join(f"\n* {row}" for row in rows) + ("\n" if rows else "")
