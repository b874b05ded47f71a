r"""Products of grouped rows: each group of consecutive rows has its own kernel.

    y_i = x_i W_g,    dx_i = dy_i W_g',    dW_g = sum over the rows of g of x_i' dy_i,

where `g` is the group of row `i`. Rows are sorted by group; a group may be empty, and rows after
the last group are zeros. `jax.lax.ragged_dot` computes them; Gale et al. 2022, "MegaBlocks",
section 4 (arXiv:2211.15841), describes such products.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft import kernels
from jaxpeft.kernels.form import Quantized
from jaxpeft.lazy import jax

Leaves = Mapping[str, Any]


def product(x: Any, kernel: Any, sizes: Any) -> Any:
    """Compute `x_i W_g` for each row.

    Args:
        x: `[rows, in]`, floating, sorted by group.
        kernel: `[groups, in, out]`; cast to the dtype of `x`.
        sizes: `[groups]` int32, the number of rows of each group.

    Returns:
        `[rows, out]`, in the dtype of `x`.
    """
    return jax.lax.ragged_dot(x, kernel.astype(x.dtype), sizes)


def stored_product(x: Any, leaves: Leaves, sizes: Any) -> Any:
    """Compute `x_i W_g` with stored kernels, which are decoded if they are quantized.

    Args:
        x: see `product`.
        leaves: the leaves of the kernels, with a leading group axis.
        sizes: see `product`.
    """
    form = kernels.FORMS[kernels.form_of(leaves) or "kernel"]
    if not isinstance(form, Quantized):
        return product(x, leaves["kernel"], sizes)

    def decode(leaves: Leaves, x: Any) -> Any:
        # decode only when x is available, so that the decoded kernels live for one product
        leaves, x = jax.lax.optimization_barrier((dict(leaves), x))
        return jax.vmap(form.read)(leaves).astype(x.dtype), x

    def forward(x: Any, leaves: Leaves, sizes: Any) -> tuple[Any, Any]:
        kernel, x = decode(leaves, x)
        return product(x, kernel, sizes), (leaves, sizes)

    def backward(saved: Any, dy: Any) -> tuple[Any, None, None]:
        leaves, sizes = saved
        kernel, dy = decode(leaves, dy)
        return product(dy, kernel.mT, sizes), None, None

    run = jax.custom_vjp(lambda x, leaves, sizes: forward(x, leaves, sizes)[0])
    run.defvjp(forward, backward)
    return run(x, {name: leaves[name] for name in form.leaves}, sizes)
