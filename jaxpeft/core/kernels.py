"""How a module's weights are read, however they are stored: the one place that knows which leaves hold a kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.lazy import jnp

Leaves = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to store a kernel.

    Attributes:
        read: gives it as one floating array, from the leaves of its module without layer axes.
        shape: its shape, from that of the leaf that tells the form.
        store: gives the leaves that hold a float32 kernel `[in, out]` in this form; None where it is held as it is.
    """

    read: Callable[[Leaves], Any]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] = tuple
    store: Callable[[Any], Leaves] | None = None


FORMS: Mapping[str, Form] = {
    "kernel": Form(lambda leaves: leaves["kernel"]),
    "embedding": Form(lambda leaves: leaves["embedding"]),
}
"""By the name of the leaf that tells how a kernel is stored."""


def form_of(leaves: Leaves) -> str | None:
    """Gives the name of the leaf that tells how a module's kernel is stored, None where it has none."""
    return next((name for name in FORMS if name in leaves), None)


def is_quantised(leaves: Leaves) -> bool:
    """Says whether a module holds its kernel in another form than its numbers."""
    return form_of(leaves) not in (None, "kernel", "embedding")


def read(leaves: Leaves, shape: tuple[int, int], order: tuple[int, ...] = ()) -> Any:
    """Gives the kernel of one site of one layer, float32 `[in, out]`.

    Args:
        leaves: of the module, without layer axes.
        shape: `(in, out)`, which a kernel of more axes is brought to.
        order: the kernel's axes, those that are contracted first; empty where they are in that order.

    Raises:
        KeyError: the module holds no kernel in a known form.
    """
    name = form_of(leaves)
    if name is None:
        raise KeyError(f"no kernel among {', '.join(leaves)}")
    kernel = FORMS[name].read(leaves).astype(jnp.float32)
    return (jnp.transpose(kernel, order) if order else kernel).reshape(shape)


def as_stored(kernel: Any, like: Any, order: tuple[int, ...] = ()) -> Any:
    """Gives a kernel `[in, out]` the axes of the leaf that it comes from; the inverse of `read` for a plain one."""
    if not order:
        return kernel.reshape(like.shape)
    back = [order.index(axis) for axis in range(len(order))]
    return jnp.transpose(kernel.reshape([like.shape[axis] for axis in order]), back)


def describe(leaves: Leaves, axes: int) -> tuple[str, tuple[int, int]] | None:
    """Gives the kind and the shape of the site that a module's leaves make, or None where they make none.

    Args:
        leaves: of the module, abstract or not.
        axes: how many of their leading axes count layers.
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
