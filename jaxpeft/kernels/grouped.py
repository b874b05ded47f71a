r"""Products of grouped rows: each group of consecutive rows has its own kernel.

    y_i = x_i W_g,    dx_i = dy_i W_g',    dW_g = sum over the rows of g of x_i' dy_i,

where `g` is the group of row `i`. Rows are sorted by group; a group may be empty. TPUs have a
program for it, `jax.lax.ragged_dot`, which elsewhere computes every row with every kernel. NVIDIA
GPUs have that of `grouped_gpu`. On other platforms each group is padded to blocks of rows, and each
block is multiplied with its kernel: Gale et al. 2022, "MegaBlocks", section 4 (arXiv:2211.15841).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft import kernels
from jaxpeft.kernels import grouped_gpu
from jaxpeft.kernels.form import Quantized, over_rows
from jaxpeft.lazy import jax, jnp

Leaves = Mapping[str, Any]
MOST_ROWS = 256
"""Maximum rows of a block: with more, groups of few rows would mostly be padding."""
LEAST_ROWS = 8


def product(x: Any, kernel: Any, sizes: Any) -> Any:
    """Compute `x_i W_g` for each row.

    Args:
        x: `[rows, in]`, floating, sorted by group.
        kernel: `[groups, in, out]`; cast to the dtype of `x`.
        sizes: `[groups]` int32, the number of rows of each group; their sum is that of all rows.

    Returns:
        `[rows, out]`, in the dtype of `x`.
    """
    kernel = kernel.astype(x.dtype)
    others = {"cuda": grouped_gpu.product} if grouped_gpu.applies(x, kernel) else {}
    return jax.lax.platform_dependent(
        x, kernel, sizes, tpu=jax.lax.ragged_dot, default=by_blocks, **others
    )


def add(y: Any, values: Any, sizes: Any) -> Any:
    """Compute `y_i + b_g` for each row, in the dtype of `y`.

    The gradient of the values is a product: a scatter would add in no fixed order on GPUs.

    Args:
        y: `[rows, out]`, floating, sorted by group.
        values: `[groups, out]`; cast to the dtype of `y`.
        sizes: see `product`.
    """
    rows = jnp.arange(len(y), dtype=sizes.dtype)
    group = jnp.searchsorted(jnp.cumsum(sizes), rows, side="right")
    group = jnp.minimum(group, len(values) - 1)

    def backward(group: Any, dy: Any) -> tuple[Any, None]:
        return over_rows(jax.nn.one_hot(group, len(values), dtype=dy.dtype), dy, dy.dtype), None

    run = jax.custom_vjp(lambda values, group: values[group])
    run.defvjp(lambda values, group: (values[group], group), backward)
    return y + run(values.astype(y.dtype), group)


def by_blocks(x: Any, kernel: Any, sizes: Any) -> Any:
    """Compute `product` by blocks of rows; takes its arguments, in one dtype."""
    rows, groups = len(x), len(sizes)
    block = min(MOST_ROWS, max(LEAST_ROWS, 1 << (rows // groups - 1).bit_length()))
    count = rows // block + groups
    padded = -(-sizes // block) * block
    first, start = jnp.cumsum(sizes) - sizes, jnp.cumsum(padded) - padded
    group = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows, dtype=sizes.dtype), side="right")
    group = jnp.minimum(group, groups - 1)
    place = start[group] + jnp.arange(rows, dtype=sizes.dtype) - first[group]
    slots = jnp.arange(count * block, dtype=sizes.dtype)
    of_block = jnp.searchsorted(jnp.cumsum(padded), slots[::block], side="right")
    of_block = jnp.minimum(of_block, groups - 1)
    of_slot = jnp.repeat(of_block, block)
    within = slots - start[of_slot]
    used = (within >= 0) & (within < sizes[of_slot])
    source = jnp.where(used, first[of_slot] + within, 0)
    blocks = _spread(x, source, used, place).reshape(count, block, -1)
    y = jnp.einsum("bmi,bio->bmo", blocks, kernel[of_block])
    return _collect(y.reshape(count * block, -1), source, used, place)


def _spread(x: Any, source: Any, used: Any, place: Any) -> Any:
    """Return `x[source]`, zeros where a slot is not used; its gradient is a gather too.

    A scatter, the gradient of a gather, would add in no fixed order on GPUs.
    """
    run = jax.custom_vjp(
        lambda x, source, used, place: jnp.where(used[:, None], x[source], jnp.zeros((), x.dtype))
    )
    run.defvjp(
        lambda x, source, used, place: (run(x, source, used, place), place),
        lambda place, dy: (dy[place], None, None, None),
    )
    return run(x, source, used, place)


def _collect(y: Any, source: Any, used: Any, place: Any) -> Any:
    """Return `y[place]`, the inverse of `_spread`."""
    run = jax.custom_vjp(lambda y, source, used, place: y[place])
    run.defvjp(
        lambda y, source, used, place: (y[place], (source, used)),
        lambda saved, dy: (
            jnp.where(saved[1][:, None], dy[saved[0]], jnp.zeros((), dy.dtype)),
            None,
            None,
            None,
        ),
    )
    return run(y, source, used, place)


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
