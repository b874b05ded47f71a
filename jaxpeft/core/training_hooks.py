"""What a method may do in training beside adding leaves: optional functions of its class, asked for
here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path

if TYPE_CHECKING:
    import optax

Leaves = Mapping[str, Any]


@runtime_checkable
class Starting(Protocol):
    """A method whose adapter may start from data or from the model's files."""

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Return the method, whose options may depend on the data, and the rewritten tree with its
        start.
        """
        ...


@runtime_checkable
class Penalized(Protocol):
    """A method that adds to the loss."""

    def penalty(self, trainable: Leaves) -> Any:
        """Return what is added to the mean loss, a float32 scalar, or None."""
        ...


@runtime_checkable
class Rated(Protocol):
    """A method whose leaves are trained at different learning rates."""

    def rate(self, path: Path) -> float:
        """Return the learning rate of a leaf as a multiple of the others'."""
        ...


@runtime_checkable
class Optimizing(Protocol):
    """A method whose update is not that of the gradient alone."""

    def optimizer(
        self, inner: optax.GradientTransformation, steps: int
    ) -> optax.GradientTransformation:
        """Return the optimizer wrapped for a run of so many steps."""
        ...


@runtime_checkable
class Positioned(Protocol):
    """A method that takes positions in front of a row's tokens."""

    @property
    def virtual_positions(self) -> int:
        """How many."""
        ...


def start(method: Method, params: Leaves, run: Any) -> tuple[Method, Leaves]:
    """Start an adapter from data, where its method asks for that; nothing of it is done again at a
    resume.

    Args:
        method: that rewrote the tree.
        params: the rewritten tree.
        run: model, tokenizer and batches: a `jaxpeft.train.data_start.Start`.

    Returns:
        `(method, params)`: the method, whose options may depend on the data, and the tree.
    """
    return method.start(params, run) if isinstance(method, Starting) else (method, params)


def penalty(method: Method, trainable: Leaves) -> Any:
    """Return what a method adds to the mean loss: a float32 scalar, or None.

    Args:
        method: that is trained.
        trainable: the trained part of the tree.
    """
    given = [part.penalty(trainable) for part in method.parts() if isinstance(part, Penalized)]
    found = [value for value in given if value is not None]
    return sum(found[1:], found[0]) if found else None


def rate(method: Method, path: Path) -> float:
    """Return the learning rate of a trained leaf as a multiple of the others'."""
    own = (part for part in method.parts() if path[-1] in (*part.leaves.names, *part.leaves.root))
    part = next(own, None)
    return part.rate(path) if isinstance(part, Rated) else 1.0


def wrap_optimizer(
    method: Method, inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """Wrap the optimizer of the trained leaves for a method whose update is not that of the
    gradient alone.

    Args:
        method: that is trained.
        inner: the optimizer, over the trained part of the tree.
        steps: of the whole run.
    """
    for part in method.parts():
        inner = part.optimizer(inner, steps) if isinstance(part, Optimizing) else inner
    return inner


def virtual_positions(method: Method) -> int:
    """Return how many positions a method takes in front of a row's tokens."""
    return sum(part.virtual_positions for part in method.parts() if isinstance(part, Positioned))


def trains_head_alone(method: Method) -> bool:
    """Return whether a method trains nothing but the head and `modules_to_save`."""
    adds = method.leaves.marker is not None or method.parts() != (method,)
    return not adds and type(method).trains is Method.trains
