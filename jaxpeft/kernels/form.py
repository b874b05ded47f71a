"""How a kernel is stored, and how a linear site computes with it: with one in few bits, which is
never trained, too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.lazy import jax, jnp

Leaves = Mapping[str, Any]
LOW_RANK = "low_rank"
"""What the narrow products of low-rank updates are marked with for remat."""
Shape = tuple[int, ...]


def _no_product(*given: Any) -> Any:
    """Stand for the product of a table, which has none.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"a table is looked up, not multiplied: {len(given)} operands")


def _no_gradient(x: Any, leaves: Leaves, dy: Any) -> None:
    del x, leaves, dy


@dataclass(frozen=True)
class Form:
    """One way to store a kernel, and to compute with it.

    Attributes:
        leaves: the names of the leaves that hold it; the first tells the form.
        read: gives it as one floating array, from the leaves of its module without layer axes.
        shape: its shape, from that of the leaf that tells the form.
        forward: gives `x W`, `[..., in] -> [..., out]` in the dtype of `x`, from `x` and the
            leaves.
        backward: gives `dy W'`, `[..., out] -> [..., in]` in the dtype of `dy`, from the leaves and
            `dy`.
        adds: whether either product can add itself to what is there: it ends in the product itself,
            not in a scaling.
        trained: gives the gradients of the leaves from `x`, the leaves and `dy`; None where they
            have none.
    """

    leaves: tuple[str, ...]
    read: Callable[[Leaves], Any]
    shape: Callable[[Shape], Shape] = tuple
    forward: Callable[[Any, Leaves], Any] = _no_product
    backward: Callable[[Leaves, Any], Any] = _no_product
    adds: bool = True
    trained: Callable[[Any, Leaves, Any], Any] = _no_gradient


@dataclass(frozen=True, kw_only=True)
class Quantized(Form):
    """One way to store a kernel in few bits.

    Attributes:
        store: gives the leaves that hold a floating kernel `[in, out]`.
        grouped: whether `store` takes `group`, how many inputs share a scale.
        even: whether the inputs must be of an even number.
        pooled: whether `store` takes `whole`, which makes a function compute on whole arrays on
            every device that holds a part of the kernel: what is added up over all of it is added
            up by such a function.

    The leaf that tells the form is that of the codes, `[out, in ...]`.
    """

    store: Callable[..., dict[str, Any]]
    grouped: bool = False
    even: bool = False
    pooled: bool = False

    def matmul(self, x: Any, leaves: Leaves) -> Any:
        """Return `x W`, `[..., in] -> [..., out]` in the dtype of `x`, with a gradient for `x`
        alone.
        """
        forward, backward = self.forward, self.backward
        run = jax.custom_vjp(forward)
        run.defvjp(
            lambda x, leaves: (forward(x, leaves), leaves),
            lambda leaves, dy: (backward(leaves, dy), None),
        )
        return run(x, dict(leaves))


def forward_of(decode: Callable[[Leaves, Any], Any]) -> Callable[[Any, Leaves], Any]:
    """Make `x W` with a kernel that is decoded for it.

    Args:
        decode: gives the transposed kernel `[out, in]` in a dtype, from its leaves.
    """

    def forward(x: Any, leaves: Leaves) -> Any:
        # decoded once x is there, not ahead of time: a kernel is needed one product long
        leaves, x = jax.lax.optimization_barrier((dict(leaves), x))
        return jax.lax.dot_general(
            x, _decode(decode, leaves, x.dtype), (((x.ndim - 1,), (1,)), ((), ()))
        )

    return forward


def backward_of(decode: Callable[[Leaves, Any], Any]) -> Callable[[Leaves, Any], Any]:
    """Make `dy W'` with a kernel that is decoded again for it: no decoded kernel is kept from the
    forward pass.

    Args:
        decode: as for `forward_of`.
    """

    def backward(leaves: Leaves, dy: Any) -> Any:
        # without the barrier XLA decodes once for both passes, and keeps every kernel of the model
        leaves, dy = jax.lax.optimization_barrier((dict(leaves), dy))
        return jax.lax.dot_general(
            dy, _decode(decode, leaves, dy.dtype), (((dy.ndim - 1,), (0,)), ((), ()))
        )

    return backward


def _decode(decode: Callable[[Leaves, Any], Any], leaves: Leaves, dtype: Any) -> Any:
    """Decode a kernel in a function of its own, which is traced once for all kernels of a shape."""
    return jax.jit(decode, static_argnums=1)(leaves, jnp.dtype(dtype))


def over_rows(narrow: Any, wide: Any, dtype: Any) -> Any:
    """Compute `narrow^T wide`, summed over all axes but the last: `[..., r]`, `[..., n]` to `[r,
    n]`.
    """
    rows = tuple(range(narrow.ndim - 1))
    return jax.lax.dot_general(
        narrow, wide, ((rows, rows), ((), ())), preferred_element_type=jnp.dtype(dtype)
    )


def select(index: Any, values: tuple[float, ...], dtype: Any) -> Any:
    """Look up a small table by a tree of selects, which XLA fuses with what is around it, as it
    does not a gather.

    Args:
        index: whole numbers below the length of the table.
        values: a power of two of them.
        dtype: of the result.
    """
    table = [jnp.asarray(value, dtype) for value in values]
    bit = 0
    while len(table) > 1:
        odd = (index >> bit) & 1 == 1
        table = [
            jnp.where(odd, high, low) for low, high in zip(table[::2], table[1::2], strict=True)
        ]
        bit += 1
    return table[0]


def pack(codes: Any) -> Any:
    """Pack 4-bit codes `[..., n]`, the earlier of two in the high half of a byte: `[..., n / 2]`
    uint8.
    """
    pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    return (pairs[..., 0] << 4) | pairs[..., 1]


def unpack(data: Any) -> Any:
    """Return the codes that `packed` has packed, uint8."""
    halves = (data[..., None] >> jnp.asarray([4, 0], jnp.uint8)) & jnp.uint8(15)
    return halves.reshape(*data.shape[:-1], -1)
