"""The methods, one file each. A new method is one file, and one line in `METHODS`."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpeft.core.method import Method
from jaxpeft.methods.bitfit import BitFit
from jaxpeft.methods.full import Full
from jaxpeft.methods.head import Head
from jaxpeft.methods.lora import LoRA

_ALL: tuple[type[Method], ...] = (LoRA, BitFit, Head, Full)

METHODS: Mapping[str, type[Method]] = {method.name: method for method in _ALL}
"""Every method by its name in configs and files."""

COMPUTES = {method.leaf_names[0]: method.compute for method in _ALL if method.leaf_names}
"""How a site that holds a method's marker leaf computes."""
