"""Computing with adapter leaves in an unchanged Linen model, by one interceptor.

Flax calls the interceptor for every method of every module. A module whose scope contains a
method's marker leaf is computed by that method; every other module runs as written. This works
under `jit`, `grad`, `nn.scan`, `nn.vmap` and `nn.remat`, because the leaves are read from the scope
like any parameter. Leaves at the root of the tree, which sites share, are passed in separately.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import expert_sites, views
from jaxpeft.core.method import Call
from jaxpeft.core.specs import Computation
from jaxpeft.errors import ConfigError
from jaxpeft.kernels import joint

TOGETHER = "together"
"""The method of a linear module that also computes other modules with the same input."""


@dataclass(frozen=True)
class Hooks:
    """The methods and inputs with which adapted modules are computed.

    Attributes:
        methods: the methods by marker leaf.
        root: the leaves at the root of the tree.
        rows: adapter index in an adapter stack, int32, a scalar or `[batch]`; None without a stack.
    """

    methods: Mapping[str, Computation]
    root: Mapping[str, Any]
    rows: Any = None

    def wrap(
        self,
        module: Any,
        name: str,
        leaves: Mapping[str, Any],
        base: Callable[..., Any],
        key: Callable[[], Any] | None,
    ) -> Callable[..., Any]:
        """Return the function that replaces a method of a module.

        Args:
            module: a Linen or an NNX module.
            name: name of its method.
            leaves: the module's own leaves.
            base: the original method.
            key: makes a dropout key; None outside of training calls.

        Raises:
            ConfigError: The method cannot adapt a module of this type.
        """
        if name == TOGETHER:
            return self._together(module, base, key is not None)
        if name == expert_sites.GROUPED:
            return self._grouped(module, leaves)
        alone = self._linear(module, key is not None) if name == "__call__" else None
        if alone is not None and alone.factors is not None:
            return lambda x: joint.products(x.astype(module.dtype), [alone])[0]
        wrapped = base
        for marker, method in self.methods.items():
            if marker in leaves and method.sites.computes(module, name):
                wrapped = self._site(module, name, leaves, wrapped, key, method)
        return wrapped

    def _together(
        self, module: Any, base: Callable[..., Any], training: bool
    ) -> Callable[..., Any]:
        """Return a function that computes sites with the same input jointly.

        It calls the original method if one of them cannot be computed jointly, or if none has an
        adapter.
        """

        def call(x: Any, *others: Any) -> Any:
            sites = [self._linear(each, training) for each in (module, *others)]
            found = [site for site in sites if site is not None]
            if len(found) < len(sites) or all(site.factors is None for site in found):
                return base(x, *others)
            return joint.products(x.astype(module.dtype), found)

        return call

    def _grouped(self, module: Any, leaves: Mapping[str, Any]) -> Callable[..., Any]:
        """Return the function that computes a linear module of experts.

        Raises:
            ConfigError: Its adapters are an adapter stack, or cannot adapt experts.
        """
        adapters = [
            method
            for marker, method in self.methods.items()
            if marker in leaves and marker not in kernels.FORMS
        ]
        for method in adapters:
            if self.rows is not None or not expert_sites.adapts_experts(method):
                what = method.name if self.rows is None else "an adapter stack"
                where = "/".join(map(str, module.path))
                raise ConfigError(f"{where}: {what} cannot adapt experts; exclude them")
        return partial(expert_sites.compute, leaves, self.root, adapters)

    def _linear(self, module: Any, training: bool) -> joint.LinearSite | None:
        """Return a module in the form `x W + x A B`; None if it computes anything else."""
        if not hasattr(type(module), TOGETHER) or self.rows is not None:
            return None
        leaves = module.variables.get("params", {})
        form = kernels.form_of(leaves)
        adapters = [
            method
            for marker, method in self.methods.items()
            if marker in leaves and marker not in kernels.FORMS
        ]
        if form is None or len(adapters) > 1:
            return None
        factors = None
        if adapters:
            (method,) = adapters
            if method.leaves.names[-1] in leaves or not method.sites.computes(module, "__call__"):
                return None
            factors = method.sites.low_rank(
                {key: leaves[key] for key in method.leaves.site if key in leaves}, training
            )
            if factors is None:
                return None
        return joint.LinearSite(
            {key: leaves[key] for key in kernels.FORMS[form].leaves}, factors, leaves.get("bias")
        )

    def _site(
        self,
        module: Any,
        name: str,
        leaves: Mapping[str, Any],
        base: Callable[..., Any],
        key: Any,
        method: Computation,
    ) -> Callable[..., Any]:
        _require_inputs(module, name, method)
        compute = getattr(method, method.sites.hooks[name])
        own = {k: leaves[k] for k in method.leaves.site if k in leaves} | {
            k: self.root[k] for k in method.leaves.root if k in self.root
        }
        if self.rows is not None and self.rows.ndim == 0:
            own = {k: leaf[self.rows] for k, leaf in own.items()}
        rows = self.rows if self.rows is not None and self.rows.ndim else None
        on = leaves.get(method.leaves.names[-1]) if method.leaves.site else None
        if on is not None and self.rows is not None:
            on = on[self.rows]

        names = tuple(inspect.signature(getattr(type(module), name)).parameters)[1:]

        def call(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = _in_order(names[: views.operands(module)], args, kwargs)
            view = views.view(module, name, leaves, args, base, method)
            out = view.restore(
                compute(Call(own, view.args, view.base, view.kernel, view.bias, kwargs, key, rows))
            )
            if on is None:
                return out
            return jnp.where(
                on.reshape(*on.shape, *(1,) * (out.ndim - on.ndim)), out, base(*args, **kwargs)
            )

        return call


def _in_order(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Convert the first keyword arguments of a call to positional ones."""
    rest = dict(kwargs)
    for name in names[len(args) :]:
        if name not in rest:
            break
        args = (*args, rest.pop(name))
    return args, rest


def _require_inputs(module: Any, name: str, method: Computation) -> None:
    """Raise an error if a module's method lacks an input that an adapter passes.

    Raises:
        ConfigError: An input is missing; it names the module's type and the input.
    """
    parameters = (
        inspect.signature(getattr(type(module), name)).parameters if method.sites.inputs else {}
    )
    for wanted in method.sites.inputs:
        if wanted not in parameters:
            raise ConfigError(
                f"{type(module).__name__}.{name} has no argument {wanted!r}, which the"
                f" {method.name} method passes; it works on the models of jaxpeft.load"
            )


def interceptor(hooks: Hooks) -> Callable[..., Any]:
    """Return the function for `flax.linen.intercept_methods`."""
    names = {
        TOGETHER,
        expert_sites.GROUPED,
        *(name for method in hooks.methods.values() for name in method.sites.hooks),
    }

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name not in names or module.scope is None:
            return next_fun(*args, **kwargs)
        leaves = module.variables.get("params", {})
        if context.method_name != TOGETHER and not any(
            marker in leaves for marker in hooks.methods
        ):
            return next_fun(*args, **kwargs)
        key = (lambda: module.make_rng("dropout")) if module.has_rng("dropout") else None
        return hooks.wrap(module, context.method_name, leaves, _repeatable(module, next_fun), key)(
            *args, **kwargs
        )

    return intercept


def _repeatable(module: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """Make a method of a Linen module callable more than once, by rewinding the scope's names."""
    runs = 0

    def repeat(*args: Any, **kwargs: Any) -> Any:
        nonlocal runs
        if runs and module.scope is not None:
            object.__setattr__(module, "scope", module.scope.rewound())
        runs += 1
        return run(*args, **kwargs)

    return repeat
