r"""Products of grouped rows on NVIDIA GPUs, by Pallas programs for Triton.

Each group is covered by tiles of consecutive rows, of which the last may reach into the next group:
a program computes a whole tile, and stores the rows of its own group. So rows are neither padded
nor copied (Gale et al. 2022, "MegaBlocks", section 5.1, arXiv:2211.15841). The gradient of the
kernels is summed by one program for each tile of each kernel, over the rows of its group.
"""

from __future__ import annotations

from typing import Any

from jaxpeft.lazy import jax, jnp

MOST_ROWS, LEAST_ROWS = 128, 16
"""Bounds of the rows of a tile."""
LEAST_SIDE = 16
"""The numbers of inputs and outputs must be multiples of it."""


def applies(x: Any, kernel: Any) -> bool:
    """Return whether `product` can compute a product.

    Args:
        x: `[rows, in]`.
        kernel: `[groups, in, out]`.
    """
    return (
        jax.default_backend() == "gpu"
        and x.dtype == kernel.dtype == jnp.bfloat16
        and len(x) >= LEAST_ROWS
        and all(side % LEAST_SIDE == 0 for side in kernel.shape[1:])
    )


def product(x: Any, kernel: Any, sizes: Any, *, interpret: bool = False) -> Any:
    """Compute `x_i W_g` for each row, with its gradients.

    Args:
        x: `[rows, in]`, bfloat16, sorted by group; at least 16 rows.
        kernel: `[groups, in, out]`, bfloat16; 16 divides the inputs and the outputs.
        sizes: `[groups]` int32, the number of rows of each group; their sum is that of all rows.
        interpret: whether to interpret the programs, on any platform.

    Returns:
        `[rows, out]`, in the dtype of `x`.
    """

    def forward(x: Any, kernel: Any, sizes: Any) -> tuple[Any, tuple[Any, ...]]:
        return _rows_product(x, kernel, sizes, False, interpret), (x, kernel, sizes)

    def backward(saved: tuple[Any, ...], dy: Any) -> tuple[Any, Any, None]:
        x, kernel, sizes = saved
        dx = _rows_product(dy, kernel, sizes, True, interpret)
        return dx, _group_sums(x, dy, sizes, interpret).astype(kernel.dtype), None

    run = jax.custom_vjp(lambda x, kernel, sizes: forward(x, kernel, sizes)[0])
    run.defvjp(forward, backward)
    return run(x, kernel, sizes)


def _rows_product(x: Any, kernel: Any, sizes: Any, transposed: bool, interpret: bool) -> Any:
    """Compute `x_i W_g`, or `x_i W_g'`, for each row."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, inner = x.shape
    width = kernel.shape[1 if transposed else 2]
    tile = _tile_rows(rows, len(sizes))
    columns, step = _side(width, 128), _side(inner, 64)
    groups, starts, stops = _tiles(sizes, rows, tile)

    def program(x: Any, kernel: Any, groups: Any, starts: Any, stops: Any, out: Any) -> None:
        which = pl.program_id(1)
        group, start, stop = groups[which], starts[which], stops[which]
        outputs = pl.ds(pl.program_id(0) * columns, columns)
        own = (start + jnp.arange(tile, dtype=jnp.int32) < stop)[:, None]

        @pl.when(start < stop)
        def _() -> None:
            def add(i: Any, total: Any) -> Any:
                inputs = pl.ds(i * step, step)
                some = _load_rows(x.at[pl.ds(start, tile), inputs], own)
                if transposed:
                    return total + _dot(some, kernel[group, outputs, inputs].T)
                return total + _dot(some, kernel[group, inputs, outputs])

            sums = jax.lax.fori_loop(0, inner // step, add, jnp.zeros((tile, columns), jnp.float32))
            triton.store(
                out.at[pl.ds(start, tile), outputs],
                sums.astype(out.dtype),
                mask=jnp.broadcast_to(own, sums.shape),
            )

    return pl.pallas_call(
        program,
        out_shape=jax.ShapeDtypeStruct((rows, width), x.dtype),
        grid=(width // columns, len(groups)),
        compiler_params=_parameters(tile),
        interpret=interpret,
        name="grouped_product",
    )(x, kernel, groups, starts, stops)


def _group_sums(x: Any, dy: Any, sizes: Any, interpret: bool) -> Any:
    """Return `[groups, in, out]` float32, the sums of `x_i' dy_i` over the rows of each group."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    rows, inner, width = *x.shape, dy.shape[1]
    tile = min(_tile_rows(rows, len(sizes)), 64)
    inputs, columns = _side(inner, 128), _side(width, 128)
    firsts = (jnp.cumsum(sizes) - sizes).astype(jnp.int32)

    def program(x: Any, dy: Any, firsts: Any, sizes: Any, out: Any) -> None:
        group = pl.program_id(0)
        start, count = firsts[group], sizes[group]
        across = pl.ds(pl.program_id(1) * inputs, inputs)
        along = pl.ds(pl.program_id(2) * columns, columns)

        def add(i: Any, total: Any) -> Any:
            begin = start + i * tile
            own = (begin + jnp.arange(tile, dtype=jnp.int32) < start + count)[:, None]
            some = pl.ds(begin, tile)
            mine = _load_rows(x.at[some, across], own)
            return total + _dot(mine.T, _load_rows(dy.at[some, along], own))

        steps = (count + tile - 1) // tile
        out[group, across, along] = jax.lax.fori_loop(
            0, steps, add, jnp.zeros((inputs, columns), jnp.float32)
        )

    return pl.pallas_call(
        program,
        out_shape=jax.ShapeDtypeStruct((len(sizes), inner, width), jnp.float32),
        grid=(len(sizes), inner // inputs, width // columns),
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=3),
        interpret=interpret,
        name="grouped_sums",
    )(x, dy, firsts, sizes.astype(jnp.int32))


def _load_rows(ref: Any, own: Any) -> Any:
    """Load rows, with zeros for those that are not `own [rows, 1]`."""
    from jax.experimental.pallas import triton

    zero = jnp.zeros((), ref.dtype)
    return triton.load(ref, mask=jnp.broadcast_to(own, ref.shape), other=zero)


def _tiles(sizes: Any, rows: int, tile: int) -> tuple[Any, Any, Any]:
    """Return the group, the first row and the end of the rows of each tile; unused tiles are
    empty.
    """
    groups = len(sizes)
    needed = -(-sizes // tile)
    ends = jnp.cumsum(needed)
    number = jnp.arange(rows // tile + groups, dtype=sizes.dtype)
    found = jnp.searchsorted(ends, number, side="right")
    group = jnp.minimum(found, groups - 1)
    first = (jnp.cumsum(sizes) - sizes)[group]
    start = first + (number - (ends - needed)[group]) * tile
    stop = jnp.where(found < groups, first + sizes[group], 0)
    return tuple(values.astype(jnp.int32) for values in (group, start, stop))  # pyright: ignore[reportReturnType]


def _tile_rows(rows: int, groups: int) -> int:
    """Return the rows of a tile: about those of a group, and at most all."""
    mean = 1 << (max(rows // groups, 1) - 1).bit_length()
    most = 1 << (rows.bit_length() - 1)
    return min(MOST_ROWS, max(LEAST_ROWS, mean), most)


def _side(size: int, most: int) -> int:
    """Return the largest power of two, at most `most`, that divides a size."""
    return min(most, size & -size)


def _parameters(tile: int) -> Any:
    from jax.experimental.pallas import triton

    return triton.CompilerParams(num_warps=8 if tile >= MOST_ROWS else 4, num_stages=4)


def _dot(a: Any, b: Any) -> Any:
    return jax.lax.dot_general(a, b, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
