"""The product with a matrix that is made of fewer numbers, as large as a kernel, and kept for no
longer than the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxpeft.core.method import Leaves
from jaxpeft.lazy import jax


def multiply(make: Callable[[Leaves], Any], leaves: Leaves, x: Any) -> Any:
    """Compute `x M(leaves)`; the backward pass makes `M` again, as one for every site would be a
    second model.

    Args:
        make: gives `M`, `[in, out]` float32, of the leaves.
        leaves: of the site.
        x: `[..., in]`, floating.

    Returns:
        `[..., out]`, in the dtype of `x`.
    """
    return jax.checkpoint(lambda leaves, x: x @ make(leaves).astype(x.dtype))(dict(leaves), x)
