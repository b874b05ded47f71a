"""Optional behavior of methods in training, as protocols and functions that check for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path

if TYPE_CHECKING:
    import optax

Leaves = Mapping[str, Any]


@runtime_checkable
class StartHook(Protocol):
    """A method whose adapter may be initialized from data or from the model's files."""

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Return the method, whose options may depend on the data, and the initialized tree."""
        ...


@runtime_checkable
class PenaltyHook(Protocol):
    """A method that adds a penalty to the loss."""

    def penalty(self, trainable: Leaves) -> Any:
        """Return the penalty on the mean loss, a float32 scalar, or None."""
        ...


@runtime_checkable
class RateHook(Protocol):
    """A method whose leaves are trained at different learning rates."""

    def rate(self, path: Path) -> float:
        """Return the multiplier of a leaf's learning rate."""
        ...


@runtime_checkable
class OptimizerHook(Protocol):
    """A method that modifies the optimizer."""

    def optimizer(
        self, inner: optax.GradientTransformation, steps: int
    ) -> optax.GradientTransformation:
        """Return the wrapped optimizer, for a run with this number of steps."""
        ...


@runtime_checkable
class PositionsHook(Protocol):
    """A method that adds virtual tokens before a row's tokens."""

    @property
    def virtual_positions(self) -> int:
        """The number of their positions."""
        ...


def start(method: Method, params: Leaves, run: Any) -> tuple[Method, Leaves]:
    """Initialize an adapter from data if its method supports that; not called on resume.

    Args:
        method: the method that rewrote the tree.
        params: the rewritten tree.
        run: model, tokenizer and batches: a `jaxpeft.train.data_start.Start`.

    Returns:
        `(method, params)`: the method, whose options may depend on the data, and the tree.
    """
    return method.start(params, run) if isinstance(method, StartHook) else (method, params)


def penalty(method: Method, trainable: Leaves) -> Any:
    """Return a method's penalty on the mean loss, a float32 scalar, or None.

    Args:
        method: the method that is trained.
        trainable: the trained part of the tree.
    """
    values = [part.penalty(trainable) for part in method.parts() if isinstance(part, PenaltyHook)]
    found = [value for value in values if value is not None]
    return sum(found[1:], found[0]) if found else None


def rate(method: Method, path: Path) -> float:
    """Return the multiplier of a trained leaf's learning rate."""
    own = (part for part in method.parts() if path[-1] in (*part.leaves.names, *part.leaves.root))
    part = next(own, None)
    return part.rate(path) if isinstance(part, RateHook) else 1.0


def wrap_optimizer(
    method: Method, inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """Wrap the optimizer of the trained leaves if the method modifies it.

    Args:
        method: the method that is trained.
        inner: the optimizer of the trained part of the tree.
        steps: number of steps of the run.
    """
    for part in method.parts():
        inner = part.optimizer(inner, steps) if isinstance(part, OptimizerHook) else inner
    return inner


def virtual_positions(method: Method) -> int:
    """Return the number of positions that a method adds before a row's tokens."""
    return sum(part.virtual_positions for part in method.parts() if isinstance(part, PositionsHook))


def trains_head_alone(method: Method) -> bool:
    """Return whether a method trains only the head and `modules_to_save`."""
    adds = method.leaves.marker is not None or method.parts() != (method,)
    return not adds and type(method).trains is Method.trains
