"""Finding the sites of a model that is not jaxpeft's own, from its modules.

The tree alone does not determine whether `[8, 4, 16]` is a `DenseGeneral` with two output axes, one
with two input axes, or a stack of layers. A Linen model is traced abstractly; an NNX module is
inspected.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from flax import nnx

from jaxpeft.core import nnx as nnx_trees
from jaxpeft.core import paths, views
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError

Shapes = dict[str, tuple[int, ...]]


def find_sites(
    model: Any,
    params: Mapping[str, Any],
    *args: Any,
    variables: Mapping[str, Any] | None = None,
    **kwargs: Any,
) -> tuple[Site, ...]:
    """List the sites of any Flax model, for `jaxpeft.rewrite(..., sites=...)`.

    Args:
        model: a Linen module, or an NNX module.
        params: its parameters; they may be abstract.
        *args: positional arguments of a Linen module; they may be abstract arrays.
        variables: further collections of a Linen module, such as `batch_stats`.
        **kwargs: keyword arguments of a Linen module.

    Returns:
        Every called module with parameters; if no method can adapt a module, its `kind` is the name
        of its type.

    Raises:
        ConfigError: Layers are stacked along an axis other than the first.
    """
    if isinstance(model, nnx.Module):
        found = {
            path: (module, _shapes(nnx_trees.own_leaves(module)), None)
            for path, module in nnx_trees.modules(model)
        }
        return tuple(
            site
            for path, (module, shapes, _) in found.items()
            if shapes
            for site in _of_nnx(path, module, shapes)
        )
    seen: dict[Path, tuple[nn.Module, Shapes, str | None]] = {}

    def look(
        fn: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if module.scope is not None and context.method_name in ("__call__", "attend"):
            own = module.variables.get("params", {})
            shapes = _shapes(
                {key: leaf for key, leaf in own.items() if not isinstance(leaf, Mapping)}
            )
            einsum = next(
                (value for value in args[1:2] if isinstance(value, str)), kwargs.get("einsum_str")
            )
            if shapes:
                seen[module.path] = module, shapes, einsum
        return fn(*args, **kwargs)

    def run(params: Any, inputs: Any) -> Any:
        with nn.intercept_methods(look):
            return model.apply({"params": params, **(variables or {})}, *inputs, **kwargs)

    jax.eval_shape(run, params, args)
    return tuple(
        _site(path, module, shapes, einsum, params)
        for path, (module, shapes, einsum) in seen.items()
    )


def _shapes(leaves: Mapping[str, Any]) -> Shapes:
    return {key: tuple(leaf.shape) for key, leaf in leaves.items()}


def _site(
    path: Path, module: Any, shapes: Shapes, einsum: str | None, params: Mapping[str, Any]
) -> Site:
    node = paths.get(params, path)
    layers: tuple[int, ...] = ()
    for name, own in shapes.items():
        full = tuple(node[name].shape)
        extra = len(full) - len(own)
        if full[extra:] != own:
            raise ConfigError(
                f"{paths.text((*path, name))} is {list(full)} in the tree and {list(own)} in its"
                " module: layers must be stacked along the first axis; scan with"
                " variable_axes={'params': 0}"
            )
        layers = full[:extra]
    return _make_site(path, module, shapes, layers, einsum)


def _of_nnx(path: Path, module: Any, shapes: Shapes) -> list[Site]:
    """Return the site of an NNX module; axes beyond those of its type are stacked layers."""
    main = (
        "kernel"
        if "kernel" in shapes
        else "embedding"
        if "embedding" in shapes
        else next(iter(shapes))
    )
    wanted = {
        nnx.Linear: 2,
        nnx.Embed: 2,
        nnx.LayerNorm: 1,
        nnx.RMSNorm: 1,
        nnx.LinearGeneral: _general_axes,
        nnx.Conv: _conv_axes,
        nnx.Einsum: _einsum_axes,
    }
    count = next((n for cls, n in wanted.items() if isinstance(module, cls)), len(shapes[main]))
    extra = len(shapes[main]) - (count(module) if callable(count) else count)
    layers = shapes[main][: max(extra, 0)]
    return [
        _make_site(
            path,
            module,
            {name: shape[len(layers) :] for name, shape in shapes.items()},
            layers,
            None,
        )
    ]


def _general_axes(module: Any) -> int:
    return len(module.in_features) + len(module.out_features)


def _conv_axes(module: Any) -> int:
    return len(module.kernel_size) + 2


def _einsum_axes(module: Any) -> int:
    return len(module.kernel_shape)


def _make_site(
    path: Path, module: Any, shapes: Shapes, layers: tuple[int, ...], einsum: str | None
) -> Site:
    plan = views.kernel_view(module, shapes, einsum) or views.KernelView(
        type(module).__name__, (0, 0)
    )
    return Site(
        path, _names(path, layers), plan.shape, layers, plan.kind, plan.order, "bias" in shapes
    )


def _names(path: Path, layers: tuple[int, ...]) -> tuple[str, ...]:
    """Return the names of a module, with layer numbers if it is stacked.

    The number follows the layer container, or else the first component.
    """
    if not layers:
        return (".".join(path),)
    count = 1
    for size in layers:
        count *= size
    if len(layers) == len(paths.stacks(path)):
        return paths.hf_names(path, layers)
    return tuple(".".join((*path[:1], str(i), *path[1:])) for i in range(count))
