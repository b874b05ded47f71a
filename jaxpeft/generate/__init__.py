"""Text generation: the function `jaxpeft.generate`, and the command `python -m jaxpeft.generate`.

Calling this package calls the function `jaxpeft.inference.generation.generate`.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Callable(ModuleType):
    """A package that is called like its function, without importing JAX before the first call."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[list[int]]:
        """Call `generate`."""
        from jaxpeft.inference.generation import generate

        return generate(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        """The signature of `generate`, for `inspect` and editors."""
        import inspect

        from jaxpeft.inference.generation import generate

        return inspect.signature(generate)


sys.modules[__name__].__class__ = _Callable
