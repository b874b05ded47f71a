"""Sharding of activations: models name the dimensions, and `on_mesh` maps the names to mesh axes
while it traces a program.

Models do not know the mesh: outside of `on_mesh` the names have no effect.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.linen import spmd
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxpeft.sharding.sizes import ROWS, SEQUENCE, TENSOR

F = TypeVar("F", bound=Callable[..., Any])
BATCH, LENGTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = (
    "batch",
    "length",
    "hidden",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "vocab",
)
NAMES: tuple[tuple[str, Any], ...] = (
    (BATCH, ROWS),
    (LENGTH, SEQUENCE),
    (HIDDEN, None),
    (HEADS, TENSOR),
    (KV_HEADS, TENSOR),
    (HEAD_DIM, None),
    (MLP, TENSOR),
    (VOCAB, TENSOR),
)
"""Mesh axes of each dimension name."""


def mesh_under(params: Any) -> Mesh | None:
    """Return the mesh of a tree's leaves, or None."""
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return next(
        (
            where.mesh
            for where in found
            if isinstance(where, NamedSharding) and isinstance(where.mesh, Mesh)
        ),
        None,
    )


def on_mesh(mesh: Mesh | None, fn: F) -> F:
    """Wrap a function so that it is traced for a mesh; return it unchanged for one device or None.

    Args:
        mesh: device mesh.
        fn: function to compile, whose arguments are on the mesh.
    """
    if mesh is None or mesh.size == 1:
        return fn

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(NAMES):
            return fn(*args, **kwargs)

    return call  # pyright: ignore[reportReturnType]


def mesh_of() -> AbstractMesh | None:
    """Return the mesh of the current trace, or None."""
    found = jax.sharding.get_abstract_mesh()
    return None if found.empty or not nn.get_logical_axis_rules() else found


def size_of(*axes: str) -> int:
    """Return the number of devices along axes of the current trace's mesh, 1 without a mesh."""
    mesh = mesh_of()
    count = 1
    for axis in axes if mesh is not None else ():
        count *= mesh.shape[axis]  # pyright: ignore[reportOptionalMemberAccess]
    return count


def spec_of(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """Return the spec of an activation; an axis that does not divide its dimension is not used.

    Args:
        shape: shape of the activation.
        *names: names of its dimensions, None for an unsharded one.
    """
    axes = spmd.logical_to_mesh_axes(names) or ()
    fits = (
        (
            axis
            if axis is not None and n % size_of(*((axis,) if isinstance(axis, str) else axis)) == 0
            else None
        )
        for n, axis in zip(shape, axes, strict=True)
    )
    return PartitionSpec(*fits)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Constrain the sharding of an activation, if the current trace has a mesh.

    Args:
        x: the activation.
        *names: names of its dimensions, None for an unsharded one.
    """
    if mesh_of() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *names))
