"""Where activations lie: the models name their dimensions, and a program that is traced for a mesh
says what the names stand for.

The models know no mesh: outside of `on_mesh` the names mean nothing, and nothing is done.
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
"""The axes that each name stands for."""


def mesh_under(params: Any) -> Mesh | None:
    """Return the mesh that the leaves of a tree lie on, None where they are on none."""
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
    """Return a function that is traced for a mesh; one device leaves it as it is, and so does None.

    Args:
        mesh: the devices.
        fn: to be compiled, with its arguments on them.
    """
    if mesh is None or mesh.size == 1:
        return fn

    @functools.wraps(fn)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(NAMES):
            return fn(*args, **kwargs)

    return traced  # pyright: ignore[reportReturnType]


def mesh_of() -> AbstractMesh | None:
    """Return the mesh that is traced for, None where there is none."""
    found = jax.sharding.get_abstract_mesh()
    return None if found.empty or not nn.get_logical_axis_rules() else found


def size_of(*axes: str) -> int:
    """Return how many devices of the mesh that is traced for are along some axes, 1 without a
    mesh.
    """
    mesh = mesh_of()
    count = 1
    for axis in axes if mesh is not None else ():
        count *= mesh.shape[axis]  # pyright: ignore[reportOptionalMemberAccess]
    return count


def spec_of(shape: tuple[int, ...], *names: str | None) -> PartitionSpec:
    """Return the spec of an activation; an axis that does not divide its dimension is left out.

    Args:
        shape: of the activation.
        *names: of its dimensions, None for one that lies along no axis.
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
    """Return where an activation lies, where a mesh is traced for.

    Args:
        x: the activation.
        *names: of its dimensions, None for one that lies along no axis.
    """
    if mesh_of() is None:
        return x
    return jax.lax.with_sharding_constraint(x, spec_of(x.shape, *names))
