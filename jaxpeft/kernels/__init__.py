"""Storage formats of kernels and their matrix products: plain, and one file per quantized format.

A new format is one file and one line in `QUANTIZED`. This package works on the leaves of one
module, not on trees.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpeft.kernels import few_rows
from jaxpeft.kernels.form import Form, Quantized, over_rows
from jaxpeft.kernels.fp8 import FP8
from jaxpeft.kernels.integers import INT4, INT8
from jaxpeft.kernels.mxfp4 import MXFP4
from jaxpeft.kernels.nf4 import NF4
from jaxpeft.lazy import jax, jnp

Leaves = Mapping[str, Any]

QUANTIZED: Mapping[str, Quantized] = {
    "nf4": NF4,
    "int4": INT4,
    "int8": INT8,
    "fp8": FP8,
    "mxfp4": MXFP4,
}
"""Every format of a quantized kernel by its name in configs."""
_PLAIN = (
    Form(
        ("kernel",),
        lambda leaves: leaves["kernel"],
        forward=lambda x, leaves: few_rows.matmul(x, leaves["kernel"].astype(x.dtype)),
        backward=lambda leaves, dy: dy @ leaves["kernel"].astype(dy.dtype).T,
        trained=lambda x, leaves, dy: {"kernel": over_rows(x, dy, leaves["kernel"].dtype)},
    ),
    Form(("embedding",), lambda leaves: leaves["embedding"]),
)
FORMS: Mapping[str, Form] = {form.leaves[0]: form for form in (*_PLAIN, *QUANTIZED.values())}
"""The storage formats by marker leaf."""


_STORED = {name: form for form in QUANTIZED.values() for name in form.leaves}


def parameters(name: str, shape: tuple[int, ...]) -> int:
    """Return the number of parameters of a leaf.

    Codes count as the unquantized kernel, scales not at all.

    Args:
        name: name of the leaf.
        shape: shape of the leaf, with its layer axes.
    """
    form = _STORED.get(name)
    if form is None:
        return math.prod(shape)
    return (
        math.prod(shape[:-2]) * math.prod(form.shape(shape[-2:])) if name == form.leaves[0] else 0
    )


def form_of(leaves: Leaves) -> str | None:
    """Return the marker leaf of the format of a module's kernel, or None if it has no kernel."""
    return next((name for name in FORMS if name in leaves), None)


def is_quantized(leaves: Leaves) -> bool:
    """Return whether a module's kernel is quantized."""
    return form_of(leaves) not in (None, "kernel", "embedding")


def read(leaves: Leaves, shape: tuple[int, int], order: tuple[int, ...] = ()) -> Any:
    """Return the kernel of one site of one layer, float32 `[in, out]`.

    Args:
        leaves: leaves of the module, without layer axes.
        shape: `(in, out)`, to which a kernel with more axes is reshaped.
        order: the kernel's axes, contracted ones first; empty if they already are.

    Raises:
        KeyError: The module has no kernel in a known format.
    """
    name = form_of(leaves)
    if name is None:
        raise KeyError(f"no kernel among {', '.join(leaves)}")
    kernel = FORMS[name].read(leaves).astype(jnp.float32)
    return (jnp.transpose(kernel, order) if order else kernel).reshape(shape)


def fetch(leaf: Any) -> Any:
    """Copy a leaf from host memory to its devices; other leaves are returned unchanged."""
    from jax.core import Tracer

    if (
        not isinstance(leaf, jax.Array)
        or isinstance(leaf, Tracer)
        or leaf.sharding.memory_kind in (None, "device")
    ):
        return leaf
    return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))


def to_stored(kernel: Any, like: Any, order: tuple[int, ...] = ()) -> Any:
    """Return a kernel `[in, out]` with the axes of its leaf; the inverse of `read` if plain."""
    if not order:
        return kernel.reshape(like.shape)
    back = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(kernel.reshape([like.shape[axis] for axis in order]), back)


def describe(leaves: Leaves, axes: int) -> tuple[str, tuple[int, int]] | None:
    """Return the kind and shape of the site with these leaves, or None if it is not a site.

    Args:
        leaves: leaves of the module, which may be abstract.
        axes: number of layer axes.
    """
    if "scale" in leaves and "kernel" not in leaves:
        width = leaves["scale"].shape[-1]
        return "norm", (width, width)
    name = form_of(leaves)
    if name is None:
        return None
    full = FORMS[name].shape(leaves[name].shape[axes:])
    if len(full) != 2:
        return None
    return ("embedding" if name == "embedding" else "linear"), (int(full[0]), int(full[1]))
