r"""MXFP4: 4-bit floating-point weights with a power of two for each block of 32 inputs.

    W[i, o] = e2m1[c[o, i]] * 2^(s[o, block of i] - 127)

`e2m1` has a sign, 2 bits of exponent and 1 of fraction: 0, 0.5, 1, 1.5, 2, 3, 4, 6. `s` is e8m0, an
exponent without sign and fraction; 255 is NaN. 4 + 8 / 32 = 4.25 bits per weight, 0.531 bytes. The
leaves are the tensors of checkpoints that are quantized to it, byte for byte.

Open Compute Project, "OCP Microscaling Formats (MX) Specification", version 1.0, sections 5 and
6.3; Rouhani et al. 2023, "Microscaling Data Formats for Deep Learning", algorithm 1
(arXiv:2310.10537).
"""

from __future__ import annotations

from typing import Any

from jaxpeft.kernels.form import Leaves, Quantized, backward_of, forward_of, pack, select, unpack
from jaxpeft.lazy import jax, jnp

BLOCK = 32
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of the codes; the fourth bit is the sign."""
_LARGEST = 2
"""The exponent of the largest magnitude."""
_BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
"""The means of neighboring magnitudes, which are rounded to the one with an even code."""
_NAN = 255
_FRACTION = 23
"""Bits of the fraction of a float32, after its exponent."""


def store(kernel: Any) -> dict[str, Any]:
    """Quantize a kernel, rounding to nearest, ties to even.

    Args:
        kernel: `[in, out]`, floating; 32 divides `in`.

    Returns:
        `kernel_mxfp4 [out, in / 2]` uint8, two codes per byte, the first in the low bits;
        `kernel_mxfp4_scale [out, in / 32]` uint8.
    """
    rows = kernel.astype(jnp.float32).T
    blocks = rows.reshape(rows.shape[0], -1, BLOCK)
    most = jnp.max(jnp.abs(blocks), axis=-1)
    exponent = (jax.lax.bitcast_convert_type(most, jnp.uint32) >> _FRACTION).astype(jnp.int32)
    scale = jnp.maximum(exponent - _LARGEST, 0).astype(jnp.uint8)
    # a block whose exponent is below that of the scale 0 is rounded to zeros
    inverse = _power(jnp.minimum(254 - scale, 254 - _LARGEST).astype(jnp.uint8))
    scaled = jnp.abs(blocks) * inverse[..., None]
    steps = [
        scaled >= bound if place % 2 else scaled > bound for place, bound in enumerate(_BOUNDS)
    ]
    codes = sum(step.astype(jnp.uint8) for step in steps)
    codes = codes | (jnp.signbit(blocks).astype(jnp.uint8) << 3)
    return {
        "kernel_mxfp4": pack(codes.reshape(rows.shape), low_first=True),
        "kernel_mxfp4_scale": scale,
    }


def _power(scale: Any) -> Any:
    """Return `2^(s - 127)` as a float32, from its bits; NaN for 255."""
    bits = jnp.where(scale > 0, scale.astype(jnp.uint32) << _FRACTION, 1 << (_FRACTION - 1))
    power = jax.lax.bitcast_convert_type(bits.astype(jnp.uint32), jnp.float32)
    return jnp.where(scale == _NAN, jnp.nan, power)


def decode(leaves: Leaves, dtype: Any) -> Any:
    """Return the transposed kernel `[out, in]`, exact unless it is out of the range of `dtype`."""
    codes = unpack(leaves["kernel_mxfp4"], low_first=True)
    magnitudes = select(codes & 7, VALUES, jnp.float32)
    values = jnp.where(codes > 7, -magnitudes, magnitudes)
    blocks = values.reshape(values.shape[0], -1, BLOCK)
    scaled = blocks * _power(leaves["kernel_mxfp4_scale"])[..., None]
    return scaled.reshape(values.shape).astype(dtype)


MXFP4 = Quantized(
    leaves=("kernel_mxfp4", "kernel_mxfp4_scale"),
    read=lambda leaves: decode(leaves, jnp.float32).T,
    shape=lambda shape: (2 * shape[1], shape[0]),
    store=store,
    forward=forward_of(decode),
    backward=backward_of(decode),
    multiple=BLOCK,
)
