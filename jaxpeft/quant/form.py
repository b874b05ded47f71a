"""How a kernel is stored, and how a linear site computes with one in few bits; the product with a kernel that is never trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.lazy import jax, jnp

Leaves = Mapping[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """One way to store a kernel.

    Attributes:
        leaves: the names of the leaves that hold it; the first tells the form.
        read: gives it as one floating array, from the leaves of its module without layer axes.
        shape: its shape, from that of the leaf that tells the form.
    """

    leaves: tuple[str, ...]
    read: Callable[[Leaves], Any]
    shape: Callable[[Shape], Shape] = tuple


@dataclass(frozen=True, kw_only=True)
class Quantised(Form):
    """One way to store a kernel in few bits.

    Attributes:
        store: gives the leaves that hold a floating kernel `[in, out]`.
        matmul: gives `x W`, `[..., in] -> [..., out]` in the dtype of `x`, from `x` and the leaves, with a gradient for `x` alone.
        grouped: whether `store` takes `group`, how many inputs share a scale.
        even: whether the inputs must be of an even number.
    """

    store: Callable[..., dict[str, Any]]
    matmul: Callable[[Any, Leaves], Any]
    grouped: bool = False
    even: bool = False


def frozen_product(decode: Callable[[Leaves, Any], Any]) -> Callable[[Any, Leaves], Any]:
    """Makes the product with a kernel that is decoded for it, and again for the backward pass.

        y = x W,    dx = dy W'

    No gradient of the leaves is computed, and no decoded kernel is kept between the two.

    Args:
        decode: gives the transposed kernel `[out, in]` in a dtype, from its leaves.
    """

    def forward(x: Any, leaves: Leaves) -> tuple[Any, Leaves]:
        kernel = decode(leaves, x.dtype)
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ()))), leaves

    def backward(leaves: Leaves, dy: Any) -> tuple[Any, None]:
        # without the barrier XLA decodes once for both passes, and keeps every kernel of the model
        leaves, dy = jax.lax.optimization_barrier((dict(leaves), dy))
        return jax.lax.dot_general(dy, decode(leaves, dy.dtype), (((dy.ndim - 1,), (0,)), ((), ()))), None

    return with_backward(forward, backward)


def with_backward(
    forward: Callable[[Any, Leaves], tuple[Any, Leaves]], backward: Callable[[Leaves, Any], tuple[Any, None]]
) -> Callable[[Any, Leaves], Any]:
    """Makes a product of its two passes.

    Args:
        forward: gives `y` and what is kept, from `x` and the leaves.
        backward: gives `dx`, and None for the leaves, from what is kept and `dy`.
    """

    def matmul(x: Any, leaves: Leaves) -> Any:
        product = jax.custom_vjp(lambda x, leaves: forward(x, leaves)[0])  # made here: JAX is imported at first use
        product.defvjp(forward, backward)
        return product(x, dict(leaves))

    return matmul


def selected(index: Any, values: tuple[float, ...], dtype: Any) -> Any:
    """Looks up a small table by a tree of selects, which XLA fuses with what is around it, as it does not a gather.

    Args:
        index: whole numbers below the length of the table.
        values: a power of two of them.
        dtype: of the result.
    """
    table = [jnp.asarray(value, dtype) for value in values]
    bit = 0
    while len(table) > 1:
        odd = (index >> bit) & 1 == 1
        table = [jnp.where(odd, high, low) for low, high in zip(table[::2], table[1::2], strict=True)]
        bit += 1
    return table[0]


def packed(codes: Any) -> Any:
    """Packs 4-bit codes `[..., n]`, the earlier of two in the high half of a byte: `[..., n / 2]` uint8."""
    pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpacked(data: Any) -> Any:
    """Gives the codes that `packed` has packed, uint8."""
    halves = (data[..., None] >> jnp.asarray([4, 0], jnp.uint8)) & jnp.uint8(15)
    return halves.reshape(*data.shape[:-1], -1)
