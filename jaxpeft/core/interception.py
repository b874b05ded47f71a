"""How a Linen model computes with adapter leaves: one interceptor, no change to the model.

Flax calls the interceptor for every module method. A module whose own scope holds a method's marker leaf is computed by
that method; every other module runs as written. It works under `jit`, `grad`, `nn.scan` and `nn.remat`, because the
leaves are read from the scope, like any parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxpeft.core.method import Call

Compute = Callable[[Call], jax.Array]


def interceptor(computes: Mapping[str, Compute]) -> Callable[..., Any]:
    """Makes the function for `flax.linen.intercept_methods`.

    Args:
        computes: from a marker leaf's name to the function that computes a site which holds it.
    """

    def intercept(
        next_fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        context: nn.module.InterceptorContext,
    ) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None or len(args) != 1 or kwargs:
            return next_fun(*args, **kwargs)
        leaves = module.variables.get("params", {})
        base: Callable[[Any], Any] = next_fun
        for marker, compute in computes.items():
            if marker in leaves:
                base = _wrap(compute, leaves, base, module)
        return base(*args)

    return intercept


def _wrap(compute: Compute, leaves: Mapping[str, Any], base: Callable[[Any], Any], module: nn.Module) -> Compute:
    key = (lambda: module.make_rng("dropout")) if module.has_rng("dropout") else None
    return lambda x: compute(Call(leaves=leaves, x=x, base=base, dropout_key=key))  # type: ignore[arg-type]
