"""The layouts of adapter folders, by name, and the names of the files that all have."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpeft.hub.adapters.adapterhub import AdapterHub
from jaxpeft.hub.adapters.folder_layout import FolderLayout

CARD, PARTS = "README.md", "jaxpeft_parts.json"
LAYOUTS: Mapping[str, FolderLayout] = {"peft": FolderLayout(), "adapters": AdapterHub()}
"""The layouts of adapter folders by name."""
