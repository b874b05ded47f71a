"""Where the leaves of a planned run lie, and what one device holds of them."""

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
        state: what it changes.
        frozen: the rest of the tree.
        batch: of an optimizer step.
        base: bytes of the base's leaves on one device, and so below.
        adapters: of the leaves that the method adds.
        optimizer: of its state.
        inputs: of the batch.
        gradients: of the trained leaves' gradients.
        dropped: axes that do not divide a dimension and were left out.
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
        """Bytes of all arguments on one device."""
        return self.base + self.adapters + self.optimizer + self.inputs


def step_arguments(subject: Subject, mesh: Mesh) -> StepArguments:
    """Return where everything lies.

    Args:
        subject: the run.
        mesh: its devices.

    Raises:
        ConfigError: no rule covers a leaf, or one of the user's own does not go with its shape.
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
    """Return the bytes of an abstract array that one device holds, none where it waits in the
    host's memory.
    """
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
