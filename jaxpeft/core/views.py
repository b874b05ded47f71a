"""A linear module of any type seen as `[..., in] -> [..., out]`, so that a method needs to know one kind of linear site only.

`Dense` is that already. `DenseGeneral`, `Einsum` and `Conv` (their NNX counterparts as well) are brought to it by reshaping
what goes in and what comes out: the axes that are contracted become one, and so do those that are made. A convolution is the
product of its patches, `[..., window * in]`, with its kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.core import kernels
from jaxpeft.core.method import Kernel, Method


@dataclass(frozen=True)
class Seen:
    """A call of a module, brought to the form that methods compute with.

    Attributes:
        args: what it is called with; of a linear module one array, `[..., in]`.
        base: computes the module, `[..., in] -> [..., out]`.
        kernel: gives its kernel, float32 `[in, out]`.
        bias: `[out]`, or None.
        restore: brings `[..., out]` to the shape that the module gives.
    """

    args: tuple[Any, ...]
    base: Callable[..., Any]
    kernel: Kernel
    bias: Any
    restore: Callable[[Any], Any]


def look(
    module: Any,
    name: str,
    leaves: Mapping[str, Any],
    args: tuple[Any, ...],
    base: Callable[..., Any],
    method: type[Method],
) -> Seen:
    """Sees a call of a module as methods compute it.

    Args:
        module: a Linen or an NNX module.
        name: of the module's method that is called.
        leaves: of its own.
        args: of the call.
        base: the module's method.
        method: that adapts it.
    """
    del module, name, method

    def kernel() -> Any:
        form = kernels.form_of(leaves)
        shape = kernels.FORMS[form].shape(leaves[form].shape) if form else ()
        return kernels.read(leaves, (shape[0], shape[1]))

    return Seen(args, base, kernel, leaves.get("bias"), lambda y: y)
