"""Linear sites whose kernel is quantised: what computes a module that holds one, as an adapter method computes its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.core.method import Call, Method
from jaxpeft.kernels import QUANTIZED
from jaxpeft.kernels.form import Quantised


@dataclass(frozen=True, kw_only=True)
class Stored(Method):
    """A linear module with a quantised kernel; of each form there is one, below.

    Class attributes:
        form: how the kernel is stored.
    """

    form: ClassVar[Quantised]

    @classmethod
    def of(cls, name: str, form: Quantised) -> type[Stored]:
        """Makes what computes the sites of one form.

        Args:
            name: of the form.
            form: how the kernel is stored.
        """

        def compute(call: Call) -> Any:
            y = form.matmul(call.x, call.leaves)
            return y if call.bias is None else y + call.bias.astype(y.dtype)

        body = {"name": name, "form": form, "leaf_names": form.leaves, "compute": staticmethod(compute)}
        return type(f"Stored{name.upper()}", (cls,), body)


MARKERS: Mapping[str, type[Method]] = {form.leaves[0]: Stored.of(name, form) for name, form in QUANTIZED.items()}
"""What computes a module that holds a quantised kernel, by the leaf that tells its form."""
