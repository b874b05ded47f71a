"""Views of linear modules of any type as `[..., in] -> [..., out]`, the only form that methods see.

`Dense` already has this form. For `DenseGeneral`, `Einsum` and `Conv` (and NNX's `LinearGeneral`,
`Einsum`, `Conv`), inputs and outputs are reshaped: the contracted axes become one, and so do the
output axes. A convolution is the product of its patches, `[..., in * window]`, with its kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from jaxpeft import kernels
from jaxpeft.core.method import Kernel
from jaxpeft.core.specs import Computation
from jaxpeft.errors import ConfigError

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KernelView:
    """The view of a module's kernel as `[in, out]`.

    Attributes:
        kind: `linear`, `embedding`, `norm`, or the type's name if no method can adapt it.
        shape: `(in, out)`.
        order: the kernel's axes, contracted ones first; empty if they already are.
    """

    kind: str
    shape: tuple[int, int]
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class CallView:
    """The view of a module's call that methods compute with.

    Attributes:
        args: its arguments; for a linear module one array, `[..., in]`.
        base: computes the module, `[..., in] -> [..., out]`.
        kernel: returns its kernel, float32 `[in, out]`.
        bias: `[out]`, or None.
        restore: reshapes `[..., out]` to the module's output shape.
    """

    args: tuple[Any, ...]
    base: Callable[..., Any]
    kernel: Kernel
    bias: Any
    restore: Callable[[Any], Any]


_DENSE = (nn.Dense, nnx.Linear)
_GENERAL = (nn.DenseGeneral, nnx.LinearGeneral)
_EINSUM = (nn.Einsum, nnx.Einsum)
_CONV = (nn.Conv, nnx.Conv)
_EMBED = (nn.Embed, nnx.Embed)
_NORM = (nn.LayerNorm, nn.RMSNorm, nnx.LayerNorm, nnx.RMSNorm)


def kernel_view(
    module: Any, leaves: Mapping[str, Shape], einsum: str | None = None
) -> KernelView | None:
    """Return the kind of site of a module and the view of its kernel.

    Args:
        module: a Linen or an NNX module.
        leaves: shapes of its own leaves, without layer axes.
        einsum: equation passed in the call of an `Einsum`, or None.

    Returns:
        The view; None for a module without leaves.
    """
    if not leaves:
        return None
    unknown = KernelView(type(module).__name__, (0, 0))
    form = kernels.form_of(leaves)
    if form is None:
        width = leaves["scale"][-1] if leaves.get("scale") else 0
        return (
            KernelView("norm", (width, width))
            if width and (isinstance(module, _NORM) or len(leaves) <= 2)
            else unknown
        )
    full = kernels.FORMS[form].shape(leaves[form])
    if isinstance(module, _EMBED):
        return KernelView("embedding", (full[0], full[1]))
    if isinstance(module, _DENSE):
        return KernelView("linear", (full[0], full[1]))
    found = _lay_out(module, full, einsum)
    if found is None:
        return unknown
    contracted, made, order = found
    shape = (math.prod(full[i] for i in contracted), math.prod(full[i] for i in made))
    return KernelView("linear", shape, () if order == tuple(range(len(full))) else order)


def _lay_out(module: Any, full: Shape, einsum: str | None) -> tuple[Shape, Shape, Shape] | None:
    """Return the contracted axes of a kernel, its output axes, and both together; None if the
    module is not supported.
    """
    if isinstance(module, _GENERAL):
        n = len(_tuple(module.axis))
        if module.batch_dims if isinstance(module, nn.DenseGeneral) else module.batch_axis:
            return None
        axes = tuple(range(len(full)))
        return axes[:n], axes[n:], axes
    if isinstance(module, _CONV):
        others = module.feature_group_count != 1 or getattr(module, "mask", None) is not None
        if others or module.padding in ("CIRCULAR", "REFLECT"):
            return None
        window, (n_in, n_out) = tuple(range(len(full) - 2)), (len(full) - 2, len(full) - 1)
        return (n_in, *window), (n_out,), (n_in, *window, n_out)
    if isinstance(module, _EINSUM):
        equation = _equation(module, einsum)
        if equation is None:
            return None
        _, kernel, _, contracted, made = equation
        order = tuple(kernel.index(c) for c in contracted + made)
        return order[: len(contracted)], order[len(contracted) :], order
    return None


def _tuple(value: Any) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, Sequence) else (value,)


def _equation(module: Any, einsum: str | None) -> tuple[str, str, str, str, str] | None:
    """Split an equation `x,kernel->y` into `(x, kernel, y, contracted letters, output letters)`."""
    text = einsum or getattr(module, "einsum_str", None)
    if text is None or "." in text:
        return None
    inputs, y = text.replace(" ", "").split("->")
    x, kernel = inputs.split(",")
    contracted = "".join(c for c in kernel if c in x and c not in y)
    made = "".join(c for c in kernel if c in y and c not in x)
    supported = (
        len(contracted) + len(made) == len(kernel)
        and set(x) == set(contracted) | (set(x) & set(y))
        and contracted
    )
    return (x, kernel, y, contracted, made) if supported and len(set(x)) == len(x) else None


def operands(module: Any) -> int:
    """Return how many positional inputs `view` needs: an `Einsum` may take its equation first."""
    return 2 if isinstance(module, _EINSUM) else 1


def view(
    module: Any,
    name: str,
    leaves: Mapping[str, Any],
    args: tuple[Any, ...],
    base: Callable[..., Any],
    method: Computation,
) -> CallView:
    """Return the view of a module's call.

    Args:
        module: a Linen or an NNX module.
        name: name of the called method of the module.
        leaves: the module's own leaves.
        args: arguments of the call.
        base: the module's method.
        method: the method that adapts it.

    Raises:
        ConfigError: The method cannot adapt a module of this type.
    """
    if not method.leaves.site:  # the method adapts the entire model
        return CallView(args, base, lambda: None, None, lambda y: y)
    einsum = (
        args[1]
        if isinstance(module, _EINSUM) and len(args) > 1 and isinstance(args[1], str)
        else None
    )
    found = kernel_view(
        module,
        {key: leaf.shape for key, leaf in leaves.items() if not isinstance(leaf, Mapping)},
        einsum,
    )
    if found is None or found.kind not in method.sites.kinds:
        kind = type(module).__name__
        raise ConfigError(
            f"{method.name} cannot adapt a {kind} ({_path_of(module)}); exclude it from the targets"
        )
    shape, order = found.shape, found.order

    def kernel() -> Any:
        return kernels.read(leaves, shape, order)

    bias = leaves.get("bias")
    if name != "__call__" or found.kind != "linear" or isinstance(module, _DENSE):
        return CallView(args, base, kernel, bias, lambda y: y)
    inputs: Any = args
    x, rest = inputs[0], inputs[1:]
    if isinstance(module, _CONV):
        return _convolution(module, x, base, kernel, bias)
    equation = _equation(module, einsum) if isinstance(module, _EINSUM) else None
    if equation is not None:
        return _einsum(equation, x, rest, base, kernel, bias, leaves["kernel"].shape)
    general: Any = module
    axes = tuple(axis % x.ndim for axis in _tuple(general.axis))
    made = leaves["kernel"].shape[len(axes) :]
    flat = None if bias is None else bias.reshape(-1)
    return _contract(
        x, axes, tuple(range(-len(made), 0)), made, lambda moved: base(moved, *rest), kernel, flat
    )


def _contract(
    x: Any,
    axes: Shape,
    places: Shape,
    made: Shape,
    base: Callable[[Any], Any],
    kernel: Kernel,
    bias: Any,
) -> CallView:
    """Return the view of a contraction, with contracted and output axes moved last and flattened.

    Args:
        x: input of the module.
        axes: the contracted axes of `x`, in the kernel's order.
        places: positions of the output axes in the result, in the kernel's order.
        made: sizes of the output axes.
        base: the module.
        kernel: returns its kernel as `[in, out]`.
        bias: `[out]`, or None.
    """
    last = tuple(range(-len(axes), 0))
    sizes = tuple(x.shape[axis] for axis in axes)

    def flat(value: Any) -> Any:
        value = jnp.moveaxis(value, axes, last)
        return value.reshape(*value.shape[: value.ndim - len(axes)], -1)

    def back(value: Any) -> Any:
        return jnp.moveaxis(value.reshape(*value.shape[:-1], *sizes), last, axes)

    def flat_out(y: Any) -> Any:
        y = jnp.moveaxis(y, places, tuple(range(-len(made), 0)))
        return y.reshape(*y.shape[: y.ndim - len(made)], -1)

    def restore(y: Any) -> Any:
        return jnp.moveaxis(y.reshape(*y.shape[:-1], *made), tuple(range(-len(made), 0)), places)

    return CallView((flat(x),), lambda value: flat_out(base(back(value))), kernel, bias, restore)


def _einsum(
    equation: tuple[str, str, str, str, str],
    x: Any,
    rest: Sequence[Any],
    base: Any,
    kernel: Kernel,
    bias: Any,
    full: Shape,
) -> CallView:
    letters, of_kernel, y, contracted, made = equation
    axes = tuple(letters.index(c) for c in contracted)
    kept = [c for c in letters if c not in contracted]
    # the batch axes must keep their order in the output; otherwise transpose it
    order = [*kept, *made]
    places = tuple(y.index(c) for c in made)
    straight = [c for c in y if c not in made] == kept

    def plain(value: Any) -> Any:
        out = base(value, *rest)
        return out if straight else jnp.transpose(out, [y.index(c) for c in order])

    if bias is not None:
        bias = jnp.transpose(bias, [[c for c in y if c in made].index(c) for c in made]).reshape(-1)
    sizes = tuple(full[of_kernel.index(c)] for c in made)
    if straight:
        return _contract(x, axes, places, sizes, plain, kernel, bias)
    inner = _contract(x, axes, tuple(range(-len(made), 0)), sizes, plain, kernel, bias)
    return CallView(
        inner.args,
        inner.base,
        kernel,
        bias,
        lambda v: jnp.transpose(inner.restore(v), [order.index(c) for c in y]),
    )


def _convolution(
    module: Any, x: Any, base: Callable[..., Any], kernel: Kernel, bias: Any
) -> CallView:
    """Return the view of a convolution: patches `[..., in * window]` times the kernel."""
    window = _tuple(module.kernel_size)
    n = len(window)
    lead = x.shape[: x.ndim - n - 1]
    batch = x.reshape(-1, *x.shape[x.ndim - n - 1 :])
    padding = module.padding
    if padding == "CAUSAL":
        (dilation,) = _map_each(module.kernel_dilation, 1)
        batch, padding = jnp.pad(batch, [(0, 0), (dilation * (window[0] - 1), 0), (0, 0)]), "VALID"
    elif isinstance(padding, int):
        padding = [(padding, padding)] * n
    elif not isinstance(padding, str):
        padding = [(side, side) if isinstance(side, int) else tuple(side) for side in padding]
    spatial = "DHW"[-n:]
    patches = jax.lax.conv_general_dilated_patches(
        batch,
        window,
        _map_each(module.strides, n),
        padding,
        lhs_dilation=_map_each(module.input_dilation, n),
        rhs_dilation=_map_each(module.kernel_dilation, n),
        dimension_numbers=(f"N{spatial}C", f"{spatial}IO", f"N{spatial}C"),
    )
    patches = patches.reshape(*lead, *patches.shape[1:])

    def product(value: Any) -> Any:
        if value is patches:
            return base(x)
        y = value @ kernel().astype(value.dtype)
        return y if bias is None else y + bias.astype(y.dtype)

    return CallView((patches,), product, kernel, bias, lambda y: y)


def _map_each(value: Any, n: int) -> tuple[int, ...]:
    """Return a number for each of `n` axes, from one number for all, None (1), or a sequence."""
    return (value or 1,) * n if value is None or isinstance(value, int) else tuple(value)


def _path_of(module: Any) -> str:
    """Return the path of a module, if it knows it."""
    path = getattr(module, "path", ())
    return "/".join(map(str, path)) or "at the root"
