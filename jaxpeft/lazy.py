"""JAX, imported at first use.

A config is checked, and refused, before JAX is imported: importing it costs about a second and, on
a pod, takes the accelerator. Modules that must be importable for that check (the methods, for their
hyperparameters) take JAX from here; everything else imports it as usual.
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
        """Stands for the module `name`; any attribute access imports it."""

        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, attribute: str) -> Any:
            return getattr(importlib.import_module(self._name), attribute)

    jax = _Lazy("jax")
    jnp = _Lazy("jax.numpy")
