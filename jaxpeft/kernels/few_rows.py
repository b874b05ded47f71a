r"""Products `x W` of few rows on NVIDIA GPUs, where reading the kernel takes the time.

A decode step multiplies one row per text with every kernel. Each program of the grid reads a panel
of the kernel once, in 64 outputs, and keeps the sums of all rows in registers; where a kernel has
few outputs, its inputs are split over several programs, whose sums are added afterwards. NF4 codes
are decoded in registers: a byte permutation (`prmt`) looks up four codes at once in the bytes of
the 16 values, rounded to bfloat16. So a code is rounded before its scale is applied, and the
results differ from those of the decoded kernel by a rounding.

The kernels are Pallas programs for Triton. All other products are those of XLA.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxpeft.lazy import jax, jnp

MOST_ROWS = 64
OUTPUTS = 64
INPUTS = 128
"""Outputs of a program, and inputs or bytes of codes that it reads at a time."""
PROGRAMS = 128
"""Programs that a grid should have: about the number of multiprocessors of a large GPU."""
MOST_SPLITS = 8


def applies(x: Any, size: int, width: int) -> bool:
    """Return whether programs for few rows can compute a product.

    Args:
        x: `[..., in]`.
        size: number of inputs, or of the bytes of one output's codes.
        width: number of outputs.
    """
    return (
        jax.default_backend() == "gpu"
        and jax.sharding.get_abstract_mesh().empty
        and 0 < math.prod(x.shape[:-1]) <= MOST_ROWS
        and x.dtype == jnp.bfloat16
        and size % INPUTS == 0
        and width % OUTPUTS == 0
    )


def dot_general(x: Any, kernel: Any, dimensions: Any, **options: Any) -> Any:
    """Compute `jax.lax.dot_general`; on GPUs, products of few rows by a program."""
    last = ((x.ndim - 1,), (0,)), ((), ())

    def usual(x: Any, kernel: Any) -> Any:
        return jax.lax.dot_general(x, kernel, dimensions, **options)

    if kernel.ndim != 2 or dimensions != last or kernel.dtype != x.dtype:
        return usual(x, kernel)
    if not applies(x, *kernel.shape):
        return usual(x, kernel)
    return on_gpu(lambda x, kernel: _products(x, kernel)[0], usual, x, kernel)


def matmul(x: Any, kernel: Any) -> Any:
    """Return `x W` for `x [..., in]` and a kernel of its dtype."""
    return dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def on_gpu(fast: Callable[..., Any], usual: Callable[..., Any], *operands: Any) -> Any:
    """Return `fast(*operands)` in programs for NVIDIA GPUs, with the gradient of `usual`."""
    run = jax.custom_vjp(
        lambda *given: jax.lax.platform_dependent(*given, cuda=fast, default=usual)
    )
    run.defvjp(
        lambda *given: (run(*given), given),
        lambda given, dy: jax.vjp(usual, *given)[1](dy),
    )
    return run(*operands)


def joins(x: Any, widths: Sequence[int]) -> bool:
    """Return whether `products` computes products with so many outputs by one program.

    Those of large kernels are faster apart.
    """
    small = sum(widths) // OUTPUTS < PROGRAMS
    return small and all(applies(x, x.shape[-1], width) for width in widths)


def products(x: Any, kernels: Sequence[Any]) -> tuple[Any, ...]:
    """Compute `x W_i` for each kernel by one program, see `joins`.

    Args:
        x: `[..., in]`.
        kernels: `[in, out_i]`, of the dtype of `x`.

    Returns:
        `[..., out_i]` for each kernel.
    """

    def usual(x: Any, *kernels: Any) -> tuple[Any, ...]:
        return tuple(x @ kernel for kernel in kernels)

    return on_gpu(_products, usual, x, *kernels)


def _products(x: Any, *kernels: Any, interpret: bool = False) -> tuple[Any, ...]:
    """Compute `x W_i` for each kernel by one program.

    Args:
        x: `[..., in]`, bfloat16, of at most 64 rows.
        kernels: `[in, out_i]`, bfloat16.
        interpret: whether to interpret the program, on any platform.
    """
    from jax.experimental import pallas as pl

    def panel(x: Any, kernel: Any, outputs: Any, start: Any, part: int) -> Any:
        def add(i: Any, total: Any) -> Any:
            at = pl.ds(start + i * INPUTS, INPUTS)
            return total + dot(x[:, at], kernel[at, outputs])

        return add_steps(part // INPUTS, add, x.shape[0])

    widths = [kernel.shape[1] for kernel in kernels]
    stored = [(kernel,) for kernel in kernels]
    rows = (x.reshape(-1, x.shape[-1]),)
    ys = run_panels("few_rows", panel, rows, stored, widths, interpret)
    return tuple(y.reshape(*x.shape[:-1], -1) for y in ys)


def run_panels(
    name: str,
    panel: Callable[..., Any],
    rows: tuple[Any, ...],
    stored: Sequence[tuple[Any, ...]],
    widths: Sequence[int],
    interpret: bool,
) -> list[Any]:
    """Compute products, by a program for each panel of outputs and each part of the inputs.

    Args:
        name: name of the program, for profiles.
        panel: `(*rows, *stored[i], outputs, start, part) -> ` the sums `[rows, 64]`, float32, over
            the inputs from `start` on, `part` of them; the arrays are references to memory.
        rows: the rows `[rows, in]`, or parts of their inputs.
        stored: the leaves of each kernel.
        widths: number of outputs of each kernel.
        interpret: see `_products`.

    Returns:
        `[rows, width]` for each kernel.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    (count, size), dtype = rows[0].shape, rows[0].dtype
    padded = max(16, 1 << (count - 1).bit_length())
    rows = tuple(jnp.pad(part, ((0, padded - count), (0, 0))) for part in rows)
    splits = _splits(size, sum(widths))
    part = size // splits
    ends = [*itertools.accumulate(width // OUTPUTS for width in widths)]

    def program(*refs: Any) -> None:
        given, outs = refs[: len(rows)], refs[-len(widths) :]
        rest = refs[len(rows) : -len(widths)]
        number, which = pl.program_id(0), pl.program_id(1)
        for begin, end, own, out in zip((0, *ends), ends, stored, outs, strict=False):
            leaves, rest = rest[: len(own)], rest[len(own) :]

            @pl.when((number >= begin) & (number < end))
            def _(begin: int = begin, leaves: Any = leaves, out: Any = out) -> None:
                outputs = pl.ds((number - begin) * OUTPUTS, OUTPUTS)
                sums = panel(*given, *leaves, outputs, which * part, part)
                out[which, :, outputs] = sums.astype(out.dtype)

    shapes = [(splits, padded, width) for width in widths]
    sums = pl.pallas_call(
        program,
        out_shape=[
            jax.ShapeDtypeStruct(shape, dtype if splits == 1 else jnp.float32) for shape in shapes
        ],
        grid=(ends[-1], splits),
        compiler_params=triton.CompilerParams(num_warps=4 if padded > 32 else 2, num_stages=4),
        interpret=interpret,
        name=name,
    )(*rows, *itertools.chain(*stored))
    return [(own[0] if splits == 1 else jnp.sum(own, axis=0).astype(dtype))[:count] for own in sums]


def _splits(size: int, width: int) -> int:
    """Return the number of parts of the inputs, a power of two."""
    splits = 1
    while (
        splits < MOST_SPLITS
        and width // OUTPUTS * splits < PROGRAMS
        and size % (2 * splits * INPUTS) == 0
    ):
        splits *= 2
    return splits


def add_steps(steps: int, add: Callable[[Any, Any], Any], rows: int) -> Any:
    """Return the sums `[rows, 64]` after all steps of `add(step, sums)`."""
    return jax.lax.fori_loop(0, steps, add, jnp.zeros((rows, OUTPUTS), jnp.float32))


def dot(a: Any, b: Any, *, transposed: bool = False) -> Any:
    """Return `a b`, or `a b'`, in float32."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


def gather(table: Any, index: Any) -> Any:
    """Return `table[index]` for a table in memory."""
    from jax.experimental.pallas import triton

    return triton.load(table.at[index])


def look_up(codes: Any, values: tuple[float, ...]) -> tuple[Any, Any]:
    """Return the values of the high and of the low code of each byte, bfloat16, inside a program.

    Args:
        codes: uint8, two codes per byte.
        values: the 16 values.
    """
    from jax.experimental.pallas import triton

    def half(high: bool) -> Any:
        (found,) = triton.elementwise_inline_asm(
            _instructions(values, high),
            args=[codes],
            constraints="=r,=r,r",
            pack=4,
            result_shape_dtypes=[jax.ShapeDtypeStruct(codes.shape, jnp.bfloat16)],
        )
        return found

    return half(True), half(False)


@functools.cache
def _instructions(values: tuple[float, ...], high: bool) -> str:
    """Return PTX that decodes the high or low codes of four bytes, `$2`, into two registers.

    `prmt` picks four of eight bytes by the four lowest hexadecimal digits of a register. The codes
    become such digits; their lower three bits pick from the first and from the second half of the
    values, once for the low bytes of the values and once for the high ones, and their highest bit
    chooses between the two.
    """
    bits = np.asarray(values, jnp.bfloat16).view(np.uint16)
    low_bytes, high_bytes = _words(bits & 255), _words(bits >> 8)
    lines = [
        ".reg .b32 code, digit, mask, first, second, low, high;",
        f"shr.u32 code, $2, {4 if high else 0};",
        "and.b32 code, code, 0x0f0f0f0f;",
        "shr.u32 digit, code, 4;",
        "or.b32 code, code, digit;",
        "prmt.b32 code, code, 0, 0x4420;",
        "and.b32 digit, code, 0x7777;",
        "shr.u32 mask, code, 3;",
        "and.b32 mask, mask, 0x1111;",
        "prmt.b32 mask, 0xff00, 0, mask;",
    ]
    for name, words in (("low", low_bytes), ("high", high_bytes)):
        lines += [
            f"prmt.b32 first, {words[0]}, {words[1]}, digit;",
            f"prmt.b32 second, {words[2]}, {words[3]}, digit;",
            f"lop3.b32 {name}, mask, second, first, 0xca;",
        ]
    lines += ["prmt.b32 $0, low, high, 0x5140;", "prmt.b32 $1, low, high, 0x7362;"]
    return "\n".join(("{", *lines, "}"))


def _words(values: Any) -> list[str]:
    """Return 16 bytes as four constants, the first byte in the lowest bits."""
    parts = (bytes(values[i : i + 4].tolist()) for i in range(0, 16, 4))
    return [f"0x{int.from_bytes(part, 'little'):08x}" for part in parts]
