"""NNX modules: their parameters as a plain tree, and computing with adapter leaves.

An NNX module owns its arrays. `params_of` returns them as the nested dict that every function here
uses; `run` puts a tree into a temporary copy of the module, whose sites have a subclass that
computes with the adapter leaves. The original module is not changed.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import jax
from flax import nnx

from jaxpeft.core import paths
from jaxpeft.core.interception import Hooks
from jaxpeft.core.paths import Path, Tree
from jaxpeft.errors import ConfigError


def params_of(model: nnx.Module) -> Tree:
    """Return the parameters of a module as a nested dict of arrays, with string keys throughout."""
    return _plain(nnx.to_pure_dict(nnx.state(model, nnx.Param)))


def _plain(node: Any) -> Any:
    return (
        {str(key): _plain(value) for key, value in node.items()}
        if isinstance(node, Mapping)
        else node
    )


def with_params(model: nnx.Module, params: Mapping[str, Any]) -> nnx.Module:
    """Return a copy of a module with these parameters.

    Args:
        model: a module; it is not changed.
        params: a tree of plain leaves, from `params_of` or `jaxpeft.merge`.

    Raises:
        ConfigError: The module has no parameter for a leaf.
    """
    copy = nnx.clone(model)
    for path, leaf in paths.walk(params):
        holder = _submodule(copy, path[:-1])
        variable = getattr(holder, path[-1], None)
        if not isinstance(variable, nnx.Variable):
            raise ConfigError(
                f"{paths.text(path)} is not a parameter of this module; merge the adapter first"
            )
        variable[...] = leaf
    return copy


def _submodule(model: Any, path: Path) -> Any:
    node = model
    for key in path:
        node = node[int(key)] if key.isdigit() and not hasattr(node, key) else _attribute(node, key)
    return node


def _attribute(node: Any, key: str) -> Any:
    return node[key] if isinstance(node, Mapping) else getattr(node, key)


def modules(model: nnx.Module) -> Iterator[tuple[Path, nnx.Module]]:
    """Yield a module and its submodules with their paths."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Module):
            yield tuple(map(str, path)), node


def own_leaves(module: Any) -> dict[str, Any]:
    """Return the arrays of a module's own parameters."""
    return {
        name: value[...]
        for name, value in vars(module).items()
        if isinstance(value, nnx.Param) and value.get_value() is not None
    }


def run(
    model: nnx.Module,
    params: Mapping[str, Any],
    hooks: Hooks,
    key: jax.Array | None,
    args: Any,
    kwargs: Any,
) -> Any:
    """Call a module with the leaves of a tree, including adapter leaves.

    Args:
        model: the module; it is not changed, and updates of its state (statistics, caches) are
            dropped.
        params: the tree, rewritten or not.
        hooks: the methods that compute adapted sites.
        key: key for the adapters' dropout, or None.
        args: positional arguments of the module.
        kwargs: keyword arguments of the module.
    """
    copy = nnx.clone(model)
    for path, node in list(_nodes(params)):
        holder = _submodule(copy, path)
        held = {name for name in node if isinstance(getattr(holder, name, None), nnx.Variable)}
        for name in held:
            getattr(holder, name)[...] = node[name]
        added = {name: leaf for name, leaf in node.items() if name not in held}
        if added and path:
            _adapt(holder, added)
    root = {name: leaf for name, leaf in params.items() if not isinstance(leaf, Mapping)}
    count = itertools.count()
    keys = None if key is None else lambda: jax.random.fold_in(key, next(count))
    token = _ACTIVE.set((hooks, keys))
    try:
        return hooks.wrap(copy, "__call__", root, copy, keys)(*args, **kwargs)
    finally:
        _ACTIVE.reset(token)


def _nodes(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, dict[str, Any]]]:
    own = {key: value for key, value in tree.items() if not isinstance(value, Mapping)}
    if own:
        yield prefix, own
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _nodes(value, (*prefix, key))


def _adapt(holder: Any, added: Mapping[str, Any]) -> None:
    """Set adapter leaves as parameters of a module, and its class to one that computes with them.

    As parameters, they are split and stacked under `nnx.scan` and `nnx.vmap` like all others.
    """
    for name, leaf in added.items():
        setattr(holder, name, nnx.Param(leaf))
    holder.__class__ = _adapted_class(type(holder))


@functools.cache
def _adapted_class(cls: type) -> type:
    """Return a subclass whose methods compute with the adapter leaves of an instance.

    It is created only once per class, because NNX and JAX cache data about each class forever.
    """

    def make_method(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(cls, name))
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            hooks, key = _ACTIVE.get()
            base = functools.partial(getattr(cls, name), self)
            return hooks.wrap(self, name, own_leaves(self), base, key)(*args, **kwargs)

        return call

    own = {name: make_method(name) for name in ("__call__", "attend", "join") if hasattr(cls, name)}
    return type(f"Adapted{cls.__name__}", (cls,), own)


_ACTIVE: ContextVar[tuple[Hooks, Callable[[], jax.Array] | None]] = ContextVar(
    "what computes adapted NNX modules"
)
