"""Shardings of a planned step's arguments, and their bytes per device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh

from jaxpeft.core import paths, tree
from jaxpeft.plan.subject import Subject
from jaxpeft.sharding.layout import layout, require_used, state_shardings
from jaxpeft.sharding.mesh import batch_shardings
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.train.step import TrainState


@dataclass(frozen=True)
class StepArguments:
    """The arguments of a step, with their shardings.

    Attributes:
        state: train state.
        frozen: frozen part of the tree.
        batch: batch of an optimizer step.
        base: bytes of the base per device, like the following.
        adapters: bytes of the adapter leaves.
        optimizer: bytes of the optimizer state.
        inputs: bytes of the batch.
        gradients: bytes of the gradients.
        dropped: descriptions of axes that do not divide a dimension and are not used.
    """

    state: TrainState
    frozen: Mapping[str, Any]
    batch: Mapping[str, Any]
    base: int
    adapters: int
    optimizer: int
    inputs: int
    gradients: int
    dropped: tuple[str, ...]

    @property
    def held(self) -> int:
        """Bytes of all arguments per device."""
        return self.base + self.adapters + self.optimizer + self.inputs


def step_arguments(subject: Subject, mesh: Mesh) -> StepArguments:
    """Return the step's arguments with their shardings.

    Args:
        subject: run to plan.
        mesh: device mesh.

    Raises:
        ConfigError: no rule matches a leaf, or a user-defined rule does not fit its shape.
    """
    config = subject.config
    params = tree.combine(subject.state.trainable, subject.frozen)
    require_used(sharding_rules(config.mesh), params)
    found = layout(mesh, sharding_rules(config.mesh), params, config.method)
    trainable = subject.state.trainable
    where = paths.map_with_path(lambda path, _: paths.get(found.shardings, path), trainable)
    state = _with(subject.state, state_shardings(mesh, subject.state, trainable, where))
    frozen = paths.map_with_path(
        lambda path, leaf: _put(leaf, paths.get(found.shardings, path)), subject.frozen
    )
    axis = int(config.train.accumulation > 1)
    batch = _with(dict(subject.batch), batch_shardings(mesh, subject.batch, axis))
    own = {path for path, _ in paths.walk(subject.base)}
    leaves = [*paths.walk(state.trainable), *paths.walk(frozen)]
    return StepArguments(
        state,
        frozen,
        batch,
        base=sum(local_bytes(leaf) for path, leaf in leaves if path in own),
        adapters=sum(local_bytes(leaf) for path, leaf in leaves if path not in own),
        optimizer=sum(map(local_bytes, jax.tree.leaves(state.optimizer))),
        inputs=sum(map(local_bytes, jax.tree.leaves(batch))),
        gradients=sum(map(local_bytes, jax.tree.leaves(state.trainable))),
        dropped=found.dropped,
    )


def local_bytes(leaf: Any) -> int:
    """Return the bytes of an abstract array per device; 0 if it is offloaded to host memory."""
    if leaf.sharding.memory_kind in ("pinned_host", "unpinned_host"):
        return 0
    size = 1
    for n in leaf.sharding.shard_shape(leaf.shape):
        size *= n
    return size * leaf.dtype.itemsize


def _put(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def _with(leaves: Any, where: Any) -> Any:
    return jax.tree.map(_put, leaves, where)
