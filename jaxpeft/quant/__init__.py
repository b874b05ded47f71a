"""Number formats of a quantised base, one file each. A new format is one file, and one line in `FORMS`."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpeft.quant.form import Quantised
from jaxpeft.quant.fp8 import FP8
from jaxpeft.quant.integers import INT4, INT8
from jaxpeft.quant.nf4 import NF4

FORMS: Mapping[str, Quantised] = {"nf4": NF4, "int4": INT4, "int8": INT8, "fp8": FP8}
"""Every format by its name in configs."""
