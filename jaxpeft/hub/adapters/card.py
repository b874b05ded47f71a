"""The model card of an adapter folder: its method, its outputs, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jaxpeft
from jaxpeft.core.method import Method
from jaxpeft.hub.adapters.folder_layout import CONFIG, FolderLayout
from jaxpeft.hub.adapters.settings import Settings


def known_elsewhere(method: Method, layout: FolderLayout) -> bool:
    """Return whether the layout's library has the method, and so can load the folder."""
    return method.peft.type is not None or layout.name != "peft"


def text(
    method: Method, layout: FolderLayout, config: Mapping[str, Any], settings: Settings
) -> str:
    """Return the model card.

    Args:
        method: the method that was trained.
        layout: layout of the folder.
        config: content of `adapter_config.json`.
        settings: settings of the run.
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
        f"{head}{what.replace(' adapter for ', ' weights for ')}{files} contain all trained weights"
        f" of the base and its head. {layout.library} has no method {method.name!r}: load them with"
        " `jaxpeft.load_adapter`, or export a full model with `python -m jaxpeft.export --to"
        f" merged`.\n{_outputs(settings)}"
    )


def _outputs(settings: Settings) -> str:
    rows = [f"problem type: {settings.problem_type}"] if settings.problem_type else []
    rows += [f"outputs, in order: {', '.join(settings.labels)}"] if settings.labels else []
    return "".join(f"\n* {row}" for row in rows) + ("\n" if rows else "")
