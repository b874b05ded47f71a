"""Storage formats of kernels and the products of a linear site, including quantized formats, which
are never trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxpeft.lazy import jax, jnp

Leaves = Mapping[str, Any]
LOW_RANK = "low_rank"
"""The checkpoint name of the low-rank products, for remat."""
Shape = tuple[int, ...]


def _no_product(*operands: Any) -> Any:
    """Raise an error, since an embedding has no product.

    Raises:
        TypeError: Always.
    """
    raise TypeError(f"an embedding is looked up, not multiplied: {len(operands)} operands")


def _no_gradient(x: Any, leaves: Leaves, dy: Any) -> None:
    del x, leaves, dy


@dataclass(frozen=True)
class Form:
    """A storage format of a kernel, and its matrix products.

    Attributes:
        leaves: names of its leaves; the first is the marker of the format.
        read: returns the kernel as one floating array, from its leaves without layer axes.
        shape: returns the kernel's shape from that of the marker leaf.
        forward: `(x, leaves) -> x W`, `[..., in] -> [..., out]`, in the dtype of `x`.
        backward: `(leaves, dy) -> dy W'`, `[..., out] -> [..., in]`, in the dtype of `dy`.
        adds: whether the products can accumulate into an existing array, that is, end in the
            matmul and not in a scaling.
        trained: `(x, leaves, dy) -> gradients` of the leaves, or None if they are not trained.
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
    """A quantized storage format.

    Attributes:
        store: returns the leaves of a floating kernel `[in, out]`.
        grouped: whether `store` accepts `group`, the number of inputs that share a scale.
        multiple: what divides the number of inputs.
        pooled: whether `store` accepts `whole`, which wraps a function so that every device of a
            sharded kernel computes it on unsharded arrays; used for sums over the full kernel.

    The marker leaf contains the codes, `[out, in ...]`.
    """

    store: Callable[..., dict[str, Any]]
    grouped: bool = False
    multiple: int = 1
    pooled: bool = False

    def matmul(self, x: Any, leaves: Leaves) -> Any:
        """Return `x W`, `[..., in] -> [..., out]`, in the dtype of `x`; only `x` has a gradient."""
        forward, backward = self.forward, self.backward
        run = jax.custom_vjp(forward)
        run.defvjp(
            lambda x, leaves: (forward(x, leaves), leaves),
            lambda leaves, dy: (backward(leaves, dy), None),
        )
        return run(x, dict(leaves))


def forward_of(decode: Callable[[Leaves, Any], Any]) -> Callable[[Any, Leaves], Any]:
    """Return the product `x W` that decodes the kernel.

    Args:
        decode: `(leaves, dtype) -> ` the transposed kernel `[out, in]`.
    """

    def forward(x: Any, leaves: Leaves) -> Any:
        # decode only when x is available, so that the decoded kernel lives for one product
        leaves, x = jax.lax.optimization_barrier((dict(leaves), x))
        return jax.lax.dot_general(
            x, _decode(decode, leaves, x.dtype), (((x.ndim - 1,), (1,)), ((), ()))
        )

    return forward


def backward_of(decode: Callable[[Leaves, Any], Any]) -> Callable[[Leaves, Any], Any]:
    """Return the product `dy W'` that decodes the kernel again instead of saving it.

    Args:
        decode: see `forward_of`.
    """

    def backward(leaves: Leaves, dy: Any) -> Any:
        # without the barrier XLA decodes once for both passes, and stores all decoded kernels
        leaves, dy = jax.lax.optimization_barrier((dict(leaves), dy))
        return jax.lax.dot_general(
            dy, _decode(decode, leaves, dy.dtype), (((dy.ndim - 1,), (0,)), ((), ()))
        )

    return backward


def _decode(decode: Callable[[Leaves, Any], Any], leaves: Leaves, dtype: Any) -> Any:
    """Decode a kernel in a jitted function, which is traced once per shape."""
    return jax.jit(decode, static_argnums=1)(leaves, jnp.dtype(dtype))


def over_rows(narrow: Any, wide: Any, dtype: Any) -> Any:
    """Compute `narrow^T wide`, summed over leading axes: `[..., r], [..., n] -> [r, n]`."""
    rows = tuple(range(narrow.ndim - 1))
    return jax.lax.dot_general(
        narrow, wide, ((rows, rows), ((), ())), preferred_element_type=jnp.dtype(dtype)
    )


def select(index: Any, values: tuple[float, ...], dtype: Any) -> Any:
    """Look up a small table by a tree of selects, which XLA can fuse, unlike a gather.

    Args:
        index: integers below the length of the table.
        values: the table, whose length is a power of two.
        dtype: dtype of the result.
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


def pack(codes: Any, *, low_first: bool = False) -> Any:
    """Pack 4-bit codes `[..., n]` into uint8 `[..., n / 2]`, the first of each pair in the high
    bits, or in the low bits.
    """
    pairs = codes.astype(jnp.uint8).reshape(*codes.shape[:-1], -1, 2)
    high, low = (1, 0) if low_first else (0, 1)
    return (pairs[..., high] << 4) | pairs[..., low]


def unpack(data: Any, *, low_first: bool = False) -> Any:
    """Unpack the uint8 codes of `pack`."""
    shifts = jnp.asarray([0, 4] if low_first else [4, 0], jnp.uint8)
    halves = (data[..., None] >> shifts) & jnp.uint8(15)
    return halves.reshape(*data.shape[:-1], -1)
