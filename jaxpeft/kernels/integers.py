r"""INT8 and INT4: integers with a scale per output, or per group of inputs of an output.

    W[i, o] = q[o, i] * s[o, group of i],    s = max |W| / q_max,  |q| <= q_max = 127 or 7

Symmetric, rounded to nearest; the scales are bfloat16, and the integers are computed from the
rounded scales. By default INT8 has one scale per output and INT4 one per 64 inputs: 1 and 0.53
bytes per weight.

Dettmers et al. 2022, "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", section
2.1 (arXiv:2208.07339); for groups Shen et al. 2019, "Q-BERT: Hessian Based Ultra Low Precision
Quantization of BERT", section 3.2 (arXiv:1909.05840).
"""

from __future__ import annotations

from typing import Any

from jaxpeft.kernels.form import Leaves, Quantized, backward_of, forward_of, pack, unpack
from jaxpeft.lazy import jnp

_GROUP = 64


def _numbers(kernel: Any, group: int, most: int) -> tuple[Any, Any]:
    """Return the integers `[out, in]`, as float32, and the bfloat16 scales `[out, in / group]`."""
    rows = kernel.astype(jnp.float32).T
    groups = rows.reshape(rows.shape[0], -1, group)
    scale = (jnp.max(jnp.abs(groups), axis=2) / most).astype(jnp.bfloat16)
    divisor = jnp.where(scale > 0, scale, 1).astype(jnp.float32)
    numbers = jnp.clip(jnp.round(groups / divisor[..., None]), -most, most)
    return numbers.reshape(rows.shape), scale


def _scale(numbers: Any, scale: Any, dtype: Any) -> Any:
    groups = (
        numbers.reshape(*scale.shape, -1).astype(jnp.float32) * scale.astype(jnp.float32)[..., None]
    )
    return groups.reshape(numbers.shape).astype(dtype)


def store_int8(kernel: Any, group: int | None = None) -> dict[str, Any]:
    """Quantize a kernel to 8 bits.

    Args:
        kernel: `[in, out]`, floating.
        group: number of inputs that share a scale, a divisor of `in`; None for all inputs.

    Returns:
        `kernel_int8 [out, in]` int8, `kernel_int8_scale [out, in / group]` bfloat16.
    """
    numbers, scale = _numbers(kernel, group or kernel.shape[0], 127)
    return {"kernel_int8": numbers.astype(jnp.int8), "kernel_int8_scale": scale}


def store_int4(kernel: Any, group: int | None = None) -> dict[str, Any]:
    """Quantize a kernel to 4 bits.

    Args:
        kernel: `[in, out]`, floating; `in` is even.
        group: number of inputs that share a scale, a divisor of `in`; None for the largest divisor
            up to 64.

    Returns:
        `kernel_int4 [out, in / 2]` uint8, two integers per byte with an offset of 8;
        `kernel_int4_scale [out, in / group]` bfloat16.
    """
    size = group or max(n for n in range(1, _GROUP + 1) if kernel.shape[0] % n == 0)
    numbers, scale = _numbers(kernel, size, 7)
    return {"kernel_int4": pack(numbers + 8), "kernel_int4_scale": scale}


def decode_int8(leaves: Leaves, dtype: Any) -> Any:
    """Return the transposed kernel `[out, in]`."""
    return _scale(leaves["kernel_int8"], leaves["kernel_int8_scale"], dtype)


def decode_int4(leaves: Leaves, dtype: Any) -> Any:
    """Return the transposed kernel `[out, in]`."""
    return _scale(
        unpack(leaves["kernel_int4"]).astype(jnp.int8) - 8, leaves["kernel_int4_scale"], dtype
    )


INT8 = Quantized(
    leaves=("kernel_int8", "kernel_int8_scale"),
    read=lambda leaves: decode_int8(leaves, jnp.float32).T,
    shape=lambda shape: (shape[1], shape[0]),
    store=store_int8,
    forward=forward_of(decode_int8),
    backward=backward_of(decode_int8),
    grouped=True,
)
INT4 = Quantized(
    leaves=("kernel_int4", "kernel_int4_scale"),
    read=lambda leaves: decode_int4(leaves, jnp.float32).T,
    shape=lambda shape: (2 * shape[1], shape[0]),
    store=store_int4,
    forward=forward_of(decode_int4),
    backward=backward_of(decode_int4),
    grouped=True,
    multiple=2,
)
