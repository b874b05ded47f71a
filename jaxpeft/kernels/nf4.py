r"""NF4: 4-bit quantiles of a normal distribution, with an 8-bit scale for each block of 64.

    W[i, o] = code[c[o, i]] * a[block],    a = dynamic[k[block]] * s[block of 256 blocks] + m

`a` is the largest magnitude of a block, `m` the mean of all `a`, `s` the largest magnitude of
`a - m` in 256 blocks, and `dynamic` an 8-bit float with a variable number of exponent bits. Blocks
run through the transposed kernel row by row, as in `bitsandbytes`: along the inputs if 64 divides
them. The total is 4 + 8 / 64 + 32 / (64 * 256) = 4.127 bits per weight, 0.516 bytes. The codes
equal those of `bitsandbytes`; about 0.2% of the 8-bit scales differ from its CPU implementation,
which chooses a neighbor of the nearest value. A block of zeros is decoded to zeros.

If a checkpoint has unquantized `a` (no double quantization), `kernel_nf4_absmax` contains them in
float32, with `s = 1` and `m = 0`.

Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 (arXiv:2305.14314);
the 8-bit type is that of Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
section 2.1 (arXiv:2110.02861).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxpeft.kernels import few_rows
from jaxpeft.kernels.form import Leaves, Quantized, backward_of, forward_of, pack, select, unpack
from jaxpeft.lazy import jax, jnp

BLOCK, SECOND = 64, 256
CODES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Appendix E of the paper."""

_BOUNDS = (
    -0.8480964004993439, -0.6106329262256622, -0.4599952697753906, -0.33967943489551544,
    -0.23460740596055984, -0.13791173323988914, -0.045525018125772476, 0.03979014977812767,
    0.1202552504837513, 0.2035212516784668, 0.2920137718319893, 0.3893125355243683,
    0.5016634166240692, 0.6427869200706482, 0.8614784181118011,
)  # fmt: skip
"""The boundaries between codes: the means of neighbors, rounded as in `bitsandbytes`."""

_NAMES = ("kernel_nf4", "kernel_nf4_absmax", "kernel_nf4_absmax_scale", "kernel_nf4_absmax_mean")


@functools.cache
def dynamic() -> tuple[float, ...]:
    """Return the 256 values of the 8-bit type in ascending order.

    There are 7 powers of ten, each with twice as many steps as the one below.
    """
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = _equal_steps(2**exponent + 1)
        means = np.float32(10.0 ** (exponent - 6)) * ((bounds[:-1] + bounds[1:]) / np.float32(2))
        found += [sign * float(mean) for mean in means for sign in (1, -1)]
    return tuple(sorted(found))


def _equal_steps(count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return equal steps from 0.1 to 1, computed from both ends with one rounding, as in torch."""
    first, last = np.float32(0.1), np.float32(1)
    step, places = float((last - first) / np.float32(count - 1)), np.arange(count)
    return np.where(
        places < count // 2, float(first) + step * places, 1 - step * places[::-1]
    ).astype(np.float32)


def store(
    kernel: Any, whole: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> dict[str, Any]:
    """Quantize a kernel.

    Args:
        kernel: `[in, out]`, floating; `in` is even.
        whole: wraps a function so that every device of a sharded kernel computes it on unsharded
            arrays; None for a single device.

    Returns:
        `kernel_nf4 [out, in / 2]` uint8, two codes per byte; `kernel_nf4_absmax` uint8, one per
        block, `[out, in / 64]`, or `[blocks]` if 64 does not divide the inputs;
        `kernel_nf4_absmax_scale [blocks / 256]` and `kernel_nf4_absmax_mean []`, float32.
    """
    rows = kernel.astype(jnp.float32).T
    # if blocks do not cross rows, they are a separate axis, along which a kernel can be sharded
    blocks = (
        rows.reshape(rows.shape[0], -1, BLOCK)
        if rows.shape[1] % BLOCK == 0
        else blocks_of(kernel.astype(jnp.float32))
    )
    absmax = jnp.max(jnp.abs(blocks), axis=-1)
    # a block of zeros gets the code of zero, independent of its rounded scale
    scaled = (
        (blocks * (1 / jnp.where(absmax > 0, absmax, 1))[..., None])
        .reshape(-1)[: rows.size]
        .reshape(rows.shape)
    )
    codes = sum((scaled > bound).astype(jnp.uint8) for bound in _BOUNDS)
    places, scale, mean = (_twice if whole is None else whole(_twice))(absmax.reshape(-1))
    return dict(zip(_NAMES, (pack(codes), places.reshape(absmax.shape), scale, mean), strict=True))


def _twice(absmax: Any) -> tuple[Any, Any, Any]:
    """Quantize the scales of all blocks `[blocks]`; return their codes, their scales and the mean.

    The barriers isolate the sum from the surrounding program, which depends on the kernel's
    sharding, so that the order of summation is always the same.
    """
    absmax = jax.lax.optimization_barrier(absmax)
    mean = jax.lax.optimization_barrier(jnp.mean(absmax))
    seconds = _pad(absmax - mean, SECOND)
    scale = jnp.max(jnp.abs(seconds), axis=1)
    places = _nearest(seconds / jnp.where(scale > 0, scale, 1)[:, None]).reshape(-1)[: absmax.size]
    return places, scale, mean


def blocks_of(kernel: Any) -> Any:
    """Return the blocks `[blocks, 64]` of a kernel `[in, out]`, the last one padded with zeros."""
    return _pad(kernel.T.reshape(-1), BLOCK)


def _pad(flat: Any, size: int) -> Any:
    return jnp.pad(flat, (0, -flat.size % size)).reshape(-1, size)


def _nearest(values: Any) -> Any:
    """Return the uint8 indices of the nearest values of the 8-bit type."""
    table = np.asarray(dynamic(), np.float32)
    return jnp.searchsorted(jnp.asarray((table[:-1] + table[1:]) / 2), values).astype(jnp.uint8)


def _dynamic(places: Any) -> Any:
    return jnp.take(jnp.asarray(dynamic(), jnp.float32), places.astype(jnp.int32))


def decode(leaves: Leaves, dtype: Any) -> Any:
    """Return the transposed kernel `[out, in]`."""
    data, places = leaves["kernel_nf4"], leaves["kernel_nf4_absmax"]
    scale = jnp.repeat(leaves["kernel_nf4_absmax_scale"], SECOND)[: places.size].reshape(
        places.shape
    )
    absmax = (places if places.dtype == jnp.float32 else _dynamic(places)) * scale + leaves[
        "kernel_nf4_absmax_mean"
    ]
    values = select(unpack(data), CODES, jnp.float32)
    if places.ndim == 2:  # blocks do not cross rows
        return (
            (values.reshape(*places.shape, BLOCK) * absmax[..., None])
            .reshape(values.shape)
            .astype(dtype)
        )
    return (values * jnp.repeat(absmax, BLOCK)[: values.size].reshape(values.shape)).astype(dtype)


def forward(x: Any, leaves: Leaves) -> Any:
    """Return `x W`; on GPUs, products of few rows are computed from the codes."""
    codes, places = leaves["kernel_nf4"], leaves["kernel_nf4_absmax"]
    if places.ndim != 2 or not few_rows.applies(x, codes.shape[1], codes.shape[0]):
        return _decoded(x, leaves)
    return few_rows.on_gpu(few_rows_product, _decoded, x, dict(leaves))


_decoded = forward_of(decode)


def few_rows_product(x: Any, leaves: Leaves, *, interpret: bool = False) -> Any:
    """Compute `x W` from the codes of a kernel whose blocks do not cross rows.

    Args:
        x: `[..., in]`, bfloat16, of at most `few_rows.MOST_ROWS` rows.
        leaves: the leaves of the kernel.
        interpret: whether to interpret the program, on any platform.

    Returns:
        `[..., out]`.
    """
    from jax.experimental import pallas as pl

    codes, places = leaves["kernel_nf4"], leaves["kernel_nf4_absmax"]
    (width, size), count = codes.shape, places.shape[1]
    step = 2 * few_rows.INPUTS // BLOCK
    look_up = _look_up if interpret else few_rows.look_up

    def panel(*refs: Any) -> Any:
        even, odd, codes, places, scale, mean, table, outputs, start, part = refs
        own = outputs.start + jnp.arange(few_rows.OUTPUTS, dtype=jnp.int32)

        def add(i: Any, total: Any) -> Any:
            at = pl.ds(start + i * few_rows.INPUTS, few_rows.INPUTS)
            block = 2 * at.start // BLOCK
            absmax = places[outputs, pl.ds(block, step)]
            if absmax.dtype != jnp.float32:
                absmax = few_rows.gather(table, absmax.astype(jnp.int32))
            number = own[:, None] * count + block + jnp.arange(step, dtype=jnp.int32)[None]
            absmax = absmax * few_rows.gather(scale, number // SECOND) + mean[0]
            wide = jnp.broadcast_to(
                absmax.astype(jnp.bfloat16)[:, :, None], (*absmax.shape, BLOCK // 2)
            ).reshape(absmax.shape[0], few_rows.INPUTS)
            high, low = look_up(codes[outputs, at], CODES)
            total += few_rows.dot(even[:, at], high * wide, transposed=True)
            return total + few_rows.dot(odd[:, at], low * wide, transposed=True)

        return few_rows.add_steps(part // few_rows.INPUTS, add, even.shape[0])

    pairs = x.reshape(-1, size, 2)  # the high code of a byte is that of an even input
    scale, mean = leaves["kernel_nf4_absmax_scale"], leaves["kernel_nf4_absmax_mean"]
    stored = (codes, places, scale, mean.reshape(1), jnp.asarray(dynamic(), jnp.float32))
    rows = (pairs[..., 0], pairs[..., 1])
    (y,) = few_rows.run_panels("nf4_few_rows", panel, rows, [stored], [width], interpret)
    return y.reshape(*x.shape[:-1], width)


def _look_up(codes: Any, values: tuple[float, ...]) -> tuple[Any, Any]:
    """Return what `few_rows.look_up` returns, without instructions of a GPU."""
    return select(codes >> 4, values, jnp.bfloat16), select(codes & 15, values, jnp.bfloat16)


NF4 = Quantized(
    leaves=_NAMES,
    read=lambda leaves: decode(leaves, jnp.float32).T,
    shape=lambda shape: (2 * shape[1], shape[0]),
    store=store,
    forward=forward,
    backward=backward_of(decode),
    multiple=2,
    pooled=True,
)
