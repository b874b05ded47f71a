"""JAX, imported on first use.

A config is checked before JAX is imported, since the import takes about a second and, on a pod,
claims the accelerator. Modules needed for that check (the methods, for their hyperparameters) use
JAX from here; all others import it as usual.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__all__ = ["jax", "jnp"]

if TYPE_CHECKING:
    import jax as jax
    import jax.numpy as jnp
else:
    import importlib

    class _Lazy:
        """Proxy of the module `name`, imported on attribute access."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    jax = _Lazy("jax")
    jnp = _Lazy("jax.numpy")
