"""How much memory a step takes, as far as can be told before anything is compiled, and what the
backward pass should keep in it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxpeft.core import paths
from jaxpeft.forward import run
from jaxpeft.hub.loading import Outline
from jaxpeft.models.base import abstract_params
from jaxpeft.models.chunked_attention import block_of
from jaxpeft.remat import ATTENTION, REMAT_POLICIES, fastest
from jaxpeft.sharding.layout import HOST, Layout, layout
from jaxpeft.sharding.rules import Rules
from jaxpeft.sharding.sizes import FSDP, SEQUENCE, TENSOR
from jaxpeft.train.head_loss import MOST_LOGITS

USABLE = 0.92
"""Share of a device's memory that a step is planned into: the allocator needs room between its
pieces.
"""


@dataclass(frozen=True)
class Estimate:
    """What a step keeps in a device's memory, in bytes.

    Attributes:
        base: the frozen leaves, as they are stored.
        trained: the trained leaves, their gradients and the optimizer's two moments, float32.
        kept: activations, by the policy of remat.
        working: the activations of the layer at work, its scores where they are written out, and
            the logits of a chunk.
    """

    base: int
    trained: int
    kept: Mapping[str, int]
    working: int

    def total(self, remat: str) -> int:
        """Return all of it under a policy."""
        return self.base + self.trained + self.kept[remat] + self.working

    def largest(self, remat: str, count: int = 3) -> list[tuple[str, int]]:
        """Return the largest terms of it under a policy, with what they are called."""
        terms = {
            "the base": self.base,
            "trained leaves, gradients and moments": self.trained,
            "activations": self.kept[remat],
            "the layer at work and logits": self.working,
        }
        return sorted(terms.items(), key=lambda term: -term[1])[:count]

    def fastest(self, budget: float) -> str:
        """Return the policy that computes least again of those that fit into `budget` bytes, `full`
        where none does.
        """
        return fastest(self.total, budget)


def estimate(
    outline: Outline, trained: int, rows: int, length: int, where: Layout | None = None
) -> Estimate:
    """Estimate the memory of a step on each device.

    Args:
        outline: of the model.
        trained: how many trained parameters a device holds.
        rows: that a device computes at once.
        length: tokens of a row that it computes.
        where: the leaves lie, as `layout_of` gives it; None for all of them on each device.
    """
    model, options = outline.model, outline.model.options
    one = model.clone(
        config=dataclasses.replace(model.config, num_hidden_layers=1),
        options=dataclasses.replace(options, scan_layers=False, remat="none", attention="xla"),
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    # of a language model the head is left out: its loss is computed in chunks
    asked: dict[str, Any] = {"hidden": True} if options.task == "causal_lm" else {}
    jaxpr = jax.make_jaxpr(lambda params, ids: run(one, params, ids, **asked))(
        abstract_params(one), ids
    )
    size, hidden, tensor = (
        jnp.dtype(options.dtype).itemsize,
        model.config.hidden_size,
        _along(where, TENSOR),
    )
    marked: Counter[str] = Counter()
    for name, aval in _named_values(jaxpr.jaxpr):
        marked[name] += _share(name, aval, hidden, tensor)
    stream = rows * length * hidden * size
    layers = model.config.num_hidden_layers
    one_layer = REMAT_POLICIES["products"].nbytes(1, stream, marked)
    vocab = model.config.vocab_size // tensor if options.task == "causal_lm" else 0
    base, gathered = _base(outline, where)
    parts = _along(where, SEQUENCE)
    queries = rows * model.config.num_attention_heads // tensor * length
    scores = 3 * 4 * _scores(options.attention, queries, length * parts) if parts > 1 else 0
    return Estimate(
        base=base,
        trained=16 * trained,
        kept={
            name: policy.nbytes(layers, stream, marked) for name, policy in REMAT_POLICIES.items()
        },
        working=scores
        + gathered
        + 2 * one_layer
        + 2 * size * min(MOST_LOGITS, rows * length * vocab),
    )


def _scores(kernel: str, queries: int, keys: int) -> int:
    """Return how many scores attention over spread positions holds at once; those behind the
    softmax and their gradients are as many.
    """
    return queries * (block_of(queries, keys) if kernel == "chunked" else keys)


def _share(name: str, aval: Any, hidden: int, tensor: int) -> int:
    """Return the bytes of an activation on a device: all of what is as wide as the model, a share
    of heads and wider ones.
    """
    whole = name != ATTENTION and aval.ndim == 3 and aval.shape[-1] == hidden
    return aval.size * aval.dtype.itemsize // (1 if whole else tensor)


def _along(where: Layout | None, axis: str) -> int:
    leaves = [] if where is None else jax.tree.leaves(where.shardings)
    return leaves[0].mesh.shape[axis] if leaves else 1


def layout_of(outline: Outline, mesh: Mesh, rules: Rules) -> Layout:
    """Find where the leaves of a base lie, as they are stored."""
    return layout(mesh, rules, outline.leaves)


def budget_of(device: Any, given: float | None) -> float | None:
    """Return how many bytes a step may take, None where nothing tells.

    Args:
        device: whose memory is asked for.
        given: GB that the config allows; None for what the device has.
    """
    if given is not None:
        return given * 1e9
    stats = device.memory_stats() or {}
    return (
        USABLE * stats["bytes_limit"]
        if "bytes_limit" in stats and device.platform != "cpu"
        else None
    )


def _base(outline: Outline, where: Layout | None) -> tuple[int, int]:
    """Return the bytes of the base on a device, and of what is fetched or gathered of it at once:
    two layers, and the largest table.
    """
    layers = outline.model.config.num_hidden_layers
    base = one_layer = table = 0
    for path, leaf in paths.walk(outline.leaves):
        there = None if where is None else paths.get(where.shardings, path)
        each = leaf.size if there is None else math.prod(there.shard_shape(leaf.shape))
        size = leaf.dtype.itemsize
        waits = there is not None and there.memory_kind == HOST
        base += 0 if waits else each * size
        if there is not None and (waits or FSDP in jax.tree.leaves(tuple(there.spec))):
            gathered = each * size * there.mesh.shape[FSDP]
            within = paths.layers_at(path) is not None
            one_layer, table = one_layer + within * gathered, max(table, (not within) * gathered)
    return base, 2 * one_layer // layers + table


def _named_values(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Yield the names that values bear, and their shapes and dtypes, those in inner programs
    too.
    """
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"], equation.outvars[0].aval
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _named_values(inner)
