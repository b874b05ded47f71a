r"""FP8: 8-bit floating-point weights with a scale per output, multiplied without decoding.

    W[i, o] = q[o, i] * s[o],    s = max |W| / 448,    q: e4m3 (4 bits of exponent, 3 of fraction)

    y = (x8 q') * sx * s,        x8 = x / sx in e4m3,          sx = max |x| / 448 of each row
    dx = (g8 q) * sg,            g8 = (dy * s) / sg in e5m2,   sg = max |dy * s| / 57344 of each row

On GPUs, the operands of both products have 8 bits, accumulated in 32. Elsewhere the kernel is
decoded and multiplied in the dtype of the activations. 1 byte per weight.

Micikevicius et al. 2022, "FP8 Formats for Deep Learning", sections 3 and 4 (arXiv:2209.05433).
"""

from __future__ import annotations

from typing import Any

from jaxpeft.kernels.form import Leaves, Quantized, backward_of, forward_of
from jaxpeft.lazy import jax, jnp

_LEAVES = ("kernel_fp8", "kernel_fp8_scale")
_TINY = 1e-30


def store(kernel: Any) -> dict[str, Any]:
    """Quantize a kernel.

    Args:
        kernel: `[in, out]`, floating.

    Returns:
        `kernel_fp8 [out, in]` float8_e4m3fn, `kernel_fp8_scale [out]` float32.
    """
    codes, scale = _rows(kernel.astype(jnp.float32).T, jnp.float8_e4m3fn)
    return {"kernel_fp8": codes, "kernel_fp8_scale": scale[:, 0]}


def _rows(x: Any, kind: Any) -> tuple[Any, Any]:
    """Return `x` in 8 bits, and the float32 scale of each row, `[..., 1]`."""
    most = float(jnp.finfo(kind).max)
    scale = (
        jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32), _TINY) / most
    )
    return jnp.clip(x.astype(jnp.float32) / scale, -most, most).astype(kind), scale


def decode(leaves: Leaves, dtype: Any) -> Any:
    """Return the transposed kernel `[out, in]`."""
    return (leaves["kernel_fp8"].astype(jnp.float32) * leaves["kernel_fp8_scale"][:, None]).astype(
        dtype
    )


def _product(x: Any, codes: Any, axis: int, dtype: Any) -> Any:
    """Return the unscaled product of codes."""
    return jax.lax.dot_general(
        x, codes, (((x.ndim - 1,), (axis,)), ((), ())), preferred_element_type=_wide(dtype)
    )


def _wide(dtype: Any) -> Any:
    """Return the dtype of unscaled products: sums of codes up to 448 may overflow float16."""
    return jnp.float32 if dtype == jnp.float16 else dtype


def _forward(x: Any, leaves: Leaves) -> Any:
    rows, scale = _rows(x, jnp.float8_e4m3fn)
    # in the dtype of x if it has the range: its rounding is far below that of the operands, and
    # only half as many bytes are written
    y = _product(rows, leaves["kernel_fp8"], 1, x.dtype)
    return (y.astype(jnp.float32) * scale * leaves["kernel_fp8_scale"]).astype(x.dtype)


def _backward(leaves: Leaves, dy: Any) -> Any:
    wide = _wide(dy.dtype)
    rows, scale = _rows(dy.astype(wide) * leaves["kernel_fp8_scale"].astype(wide), jnp.float8_e5m2)
    dx = _product(rows, leaves["kernel_fp8"], 0, dy.dtype)
    return (dx.astype(jnp.float32) * scale).astype(dy.dtype)


def forward(x: Any, leaves: Leaves) -> Any:
    """Compute `x W`, in 8 bits on a GPU, elsewhere in the dtype of `x`."""
    return jax.lax.platform_dependent(x, dict(leaves), cuda=_forward, default=forward_of(decode))


def backward(leaves: Leaves, dy: Any) -> Any:
    """Compute `dy W'`, in 8 bits on a GPU, elsewhere in the dtype of `dy`."""
    return jax.lax.platform_dependent(dict(leaves), dy, cuda=_backward, default=backward_of(decode))


FP8 = Quantized(
    leaves=_LEAVES,
    read=lambda leaves: decode(leaves, jnp.float32).T,
    shape=lambda shape: (shape[1], shape[0]),
    store=store,
    forward=forward,
    backward=backward,
    adds=False,
)
