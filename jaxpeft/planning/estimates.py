"""What a step keeps beside its arguments, from one layer's program: to choose remat, and where no program of the chip's own is at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from jaxpeft.core import kernels, paths, tree
from jaxpeft.hub.loading import Outline, abstract_params
from jaxpeft.hub.weights import WeightPlan
from jaxpeft.planning.subject import Subject
from jaxpeft.sharding.sizes import FSDP, ROWS, SEQUENCE, TENSOR
from jaxpeft.training import memory
from jaxpeft.training.head_loss import MOST_LOGITS

POLICIES = ("products", "attention", "full")
"""Of remat, from the one that computes least again to the one that computes most."""


@dataclass(frozen=True)
class Kept:
    """Bytes of one device.

    Attributes:
        kept: activations that wait for the backward pass, by the policy of remat.
        working: the layer at work, its gathered or decoded kernels, a chunk of logits, and the gradients of the trained leaves.
    """

    kept: Mapping[str, int]
    working: int

    def total(self, remat: str) -> int:
        """Gives all of it under a policy."""
        return self.kept[remat] + self.working

    def fastest(self, room: float) -> str:
        """Gives the policy that computes least again of those that fit into `room` bytes, `full` where none does."""
        return next((policy for policy in POLICIES if self.total(policy) <= room), "full")


def kept(subject: Subject, mesh: Mapping[str, int]) -> Kept:
    """Estimates what a step keeps.

    Args:
        subject: the run.
        mesh: size of each axis.
    """
    model, over = subject.model, math.prod(mesh[axis] for axis in ROWS)
    rows, length = -(-subject.rows // over), -(-subject.length // mesh[SEQUENCE])
    # of the outline its model alone is read: there are no files
    outline = Outline(model, abstract_params(model), {}, {}, WeightPlan({}, (), ()))
    own = memory.estimate(outline, 0, rows, length)
    layers, size = model.config.num_hidden_layers, jnp.dtype(model.options.dtype).itemsize
    stream = layers * rows * length * model.config.hidden_size * size
    split = {policy: stream + (n - stream) // mesh[TENSOR] for policy, n in own.kept.items()}
    # what differentiation keeps is not known here; what is offloaded waits elsewhere, but for the layers' inputs
    split |= {"none": split["products"], "offload": split["full"]}
    vocab = model.config.vocab_size if model.options.task == "causal_lm" else 0
    logits = 2 * size * min(MOST_LOGITS // over, rows * length * vocab)
    gradients = 4 * tree.count(subject.state.trainable)
    working = 2 * split["products"] // layers + logits + gradients + _kernels(subject, mesh)
    return Kept(split, working)


def _kernels(subject: Subject, mesh: Mapping[str, int]) -> int:
    """Gives the bytes of kernels that exist whole while they are used: of a layer where they are gathered, else the largest decoded one."""
    size = jnp.dtype(subject.model.options.dtype).itemsize
    layers = subject.model.config.num_hidden_layers
    inner = [
        kernels.parameters(path[-1], leaf.shape) // (layers if paths.layer_axis(path) is not None else 1)
        for path, leaf in paths.walk(subject.base)
        if any(key in paths.LAYER_CONTAINERS for key in path)
    ]
    stacked = any(paths.layer_axis(path) is not None for path, _ in paths.walk(subject.base))
    whole = sum(inner) // (1 if stacked else layers)
    if mesh[FSDP] > 1:
        return 2 * size * whole // mesh[TENSOR]
    return size * max(inner, default=0) // mesh[TENSOR] if subject.model.options.quant else 0
