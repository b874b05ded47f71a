"""Estimate a step's memory beyond its arguments from one layer's program, to choose a remat policy
and for chips without their own compiler here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.plan.step_arguments import StepArguments
from jaxpeft.plan.subject import Subject
from jaxpeft.remat import fastest
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.sharding.sizes import SEQUENCE, TENSOR, row_shards
from jaxpeft.train import memory


@dataclass(frozen=True)
class KeptMemory:
    """Estimated bytes per device.

    Attributes:
        kept: activations saved for the backward pass, by remat policy.
        working: current layer, its gathered or dequantized kernels, a chunk of logits, and the
            gradients of the trainable leaves.
    """

    kept: Mapping[str, int]
    working: int

    def total(self, remat: str) -> int:
        """Return the total under a remat policy."""
        return self.kept[remat] + self.working

    def fastest(self, room: float) -> str:
        """Return the policy with the least recomputation that fits into `room`, or `full`."""
        return fastest(self.total, room)


def estimate_kept(subject: Subject, placed: StepArguments, mesh: Mesh) -> KeptMemory:
    """Estimate a step's memory beyond its arguments.

    Args:
        subject: run to plan.
        placed: arguments of the step with their shardings.
        mesh: device mesh.
    """
    over = row_shards(mesh.shape)
    rows, length = -(-subject.rows // over), -(-subject.length // mesh.shape[SEQUENCE])
    where = memory.layout_of(subject.outline, mesh, sharding_rules(subject.config.mesh))
    own = memory.estimate(subject.outline, 0, rows, length, where)
    return KeptMemory(own.kept, own.working + placed.gradients + _decoded_bytes(subject, mesh))


def _decoded_bytes(subject: Subject, mesh: Mesh) -> int:
    """Return the bytes of the largest dequantized kernel of a quantized base."""
    if subject.model.options.quant is None:
        return 0
    size = jnp.dtype(subject.model.options.dtype).itemsize
    # the experts of a layer are decoded together
    inner = [
        kernels.parameters(path[-1], leaf.shape) // paths.layer_count(path, leaf)
        for path, leaf in paths.walk(subject.base)
        if paths.layers_at(path) is not None
    ]
    return size * max(inner, default=0) // mesh.shape[TENSOR]
