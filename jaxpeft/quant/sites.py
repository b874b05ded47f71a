"""The computation of linear modules with a quantized kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.core.method import Call
from jaxpeft.core.specs import LeafSpec, SiteSpec
from jaxpeft.kernels import QUANTIZED
from jaxpeft.kernels.form import Quantized


@dataclass(frozen=True)
class QuantizedSite:
    """The computation of a linear module with a quantized kernel.

    Attributes:
        name: name of the number format.
        form: the number format.
    """

    name: str
    form: Quantized

    @property
    def leaves(self) -> LeafSpec:
        """The leaves of the kernel."""
        return LeafSpec(self.form.leaves)

    @property
    def sites(self) -> SiteSpec:
        """Linear modules, computed by `compute`."""
        return SiteSpec()

    def compute(self, call: Call) -> Any:
        """Compute `x W + b`, `[..., in] -> [..., out]`, in the dtype of `x`, from the codes."""
        y = self.form.matmul(call.x, call.leaves)
        return y if call.bias is None else y + call.bias.astype(y.dtype)


MARKERS: Mapping[str, QuantizedSite] = {
    form.leaves[0]: QuantizedSite(name, form) for name, form in QUANTIZED.items()
}
"""The computation for each quantized format, by its marker leaf."""
