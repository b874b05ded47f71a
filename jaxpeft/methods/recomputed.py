"""The product with a kernel-sized matrix that is computed from fewer values and not saved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxpeft.core.method import Leaves
from jaxpeft.lazy import jax


def multiply(make: Callable[[Leaves], Any], leaves: Leaves, x: Any) -> Any:
    """Compute `x M(leaves)`; the backward pass recomputes `M` instead of saving it.

    Args:
        make: returns `M`, `[in, out]` float32, from the leaves.
        leaves: leaves of the site.
        x: `[..., in]`, floating.

    Returns:
        `[..., out]`, in the dtype of `x`.
    """
    return jax.checkpoint(lambda leaves, x: x @ make(leaves).astype(x.dtype))(dict(leaves), x)
