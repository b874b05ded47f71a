"""Estimate the memory of a train step before compiling it, and choose a remat policy that fits."""

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
"""Share of a device's memory that a step may use; the rest allows for fragmentation."""


@dataclass(frozen=True)
class Estimate:
    """Estimated device memory of a step, in bytes.

    Attributes:
        base: frozen leaves, as stored.
        trained: trainable leaves, their gradients and the optimizer's two moments, float32.
        kept: saved activations, by remat policy.
        working: activations of the current layer, its materialized attention scores, and the logits
            of a chunk.
    """

    base: int
    trained: int
    kept: Mapping[str, int]
    working: int

    def total(self, remat: str) -> int:
        """Return the total under a remat policy."""
        return self.base + self.trained + self.kept[remat] + self.working

    def largest(self, remat: str, count: int = 3) -> list[tuple[str, int]]:
        """Return the names and sizes of the largest terms under a remat policy."""
        terms = {
            "base": self.base,
            "trainable parameters, gradients and moments": self.trained,
            "saved activations": self.kept[remat],
            "current layer and logits": self.working,
        }
        return sorted(terms.items(), key=lambda term: -term[1])[:count]

    def fastest(self, budget: float) -> str:
        """Return the policy with the least recomputation that fits into `budget`, or `full`."""
        return fastest(self.total, budget)


def estimate(
    outline: Outline, trained: int, rows: int, length: int, where: Layout | None = None
) -> Estimate:
    """Estimate the memory of a step on each device.

    Args:
        outline: outline of the model.
        trained: number of trainable parameters per device.
        rows: number of rows that a device computes at once.
        length: number of tokens per row and device.
        where: layout of the leaves, from `layout_of`; None if every device has all leaves.
    """
    model, options = outline.model, outline.model.options
    size, tensor = jnp.dtype(options.dtype).itemsize, _along(where, TENSOR)
    layers, stream = model.config.num_hidden_layers, rows * length * model.config.hidden_size * size
    kinds = Counter(layer.with_keys for layer in getattr(model.config, "per_layer", ()))
    alike = kinds or Counter({model.config: layers})
    total, one_layer = Counter[str](), 0
    for config, count in alike.items():
        marked = _marked(model.clone(config=config), rows, length, tensor)
        one_layer = max(one_layer, REMAT_POLICIES["products"].nbytes(1, stream, marked))
        total += Counter({name: count * nbytes for name, nbytes in marked.items()})
    mean = {name: nbytes // layers for name, nbytes in total.items()}
    vocab = model.config.vocab_size // tensor if options.task == "causal_lm" else 0
    base, gathered = _base(outline, where)
    parts = _along(where, SEQUENCE)
    queries = rows * model.config.num_attention_heads // tensor * length
    scores = 3 * 4 * _scores(options.attention, queries, length * parts) if parts > 1 else 0
    return Estimate(
        base=base,
        trained=16 * trained,
        kept={name: policy.nbytes(layers, stream, mean) for name, policy in REMAT_POLICIES.items()},
        working=scores
        + gathered
        + 2 * one_layer
        + 2 * size * min(MOST_LOGITS, rows * length * vocab),
    )


def _marked(model: Any, rows: int, length: int, tensor: int) -> Counter[str]:
    """Return the bytes per device of the values of a layer, by checkpoint name.

    Args:
        model: a model whose layers are equal.
        rows: number of rows that a device computes at once.
        length: number of tokens per row and device.
        tensor: number of shards of heads and wide activations.
    """
    one = model.clone(
        config=dataclasses.replace(model.config, num_hidden_layers=1),
        options=dataclasses.replace(
            model.options, scan_layers=False, remat="none", attention="xla"
        ),
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    # exclude a language model's head: its loss is computed in chunks
    extra: dict[str, Any] = {"hidden": True} if model.options.task == "causal_lm" else {}
    jaxpr = jax.make_jaxpr(lambda params, ids: run(one, params, ids, **extra))(
        abstract_params(one), ids
    )
    found: Counter[str] = Counter()
    for name, aval in _named_values(jaxpr.jaxpr):
        found[name] += _share(name, aval, model.config.hidden_size, tensor)
    return found


def _scores(kernel: str, queries: int, keys: int) -> int:
    """Return the number of scores that attention over sharded positions materializes at once.

    The softmax outputs and their gradients are equally large.
    """
    return queries * (block_of(queries, keys) if kernel == "chunked" else keys)


def _share(name: str, aval: Any, hidden: int, tensor: int) -> int:
    """Return the bytes of an activation per device: heads and wide activations are sharded over
    `tensor`, those of the hidden size are not.
    """
    replicated = name != ATTENTION and aval.ndim == 3 and aval.shape[-1] == hidden
    return aval.size * aval.dtype.itemsize // (1 if replicated else tensor)


def _along(where: Layout | None, axis: str) -> int:
    leaves = [] if where is None else jax.tree.leaves(where.shardings)
    return leaves[0].mesh.shape[axis] if leaves else 1


def layout_of(outline: Outline, mesh: Mesh, rules: Rules) -> Layout:
    """Return the layout of a base's leaves, as stored."""
    return layout(mesh, rules, outline.leaves)


def budget_of(device: Any, limit_gb: float | None) -> float | None:
    """Return how many bytes a step may use, or None if unknown.

    Args:
        device: device whose memory is queried.
        limit_gb: limit set in the config, in GB; None to use the device's memory.
    """
    if limit_gb is not None:
        return limit_gb * 1e9
    stats = device.memory_stats() or {}
    return (
        USABLE * stats["bytes_limit"]
        if "bytes_limit" in stats and device.platform != "cpu"
        else None
    )


def _base(outline: Outline, where: Layout | None) -> tuple[int, int]:
    """Return the bytes of the base per device, and of the leaves fetched or gathered at once (two
    layers and the largest table).
    """
    base = table = 0
    layers: Counter[str] = Counter()
    for path, leaf in paths.walk(outline.leaves):
        sharding = None if where is None else paths.get(where.shardings, path)
        each = leaf.size if sharding is None else math.prod(sharding.shard_shape(leaf.shape))
        size = leaf.dtype.itemsize
        offloaded = sharding is not None and sharding.memory_kind == HOST
        base += 0 if offloaded else each * size
        if sharding is not None and (offloaded or FSDP in jax.tree.leaves(tuple(sharding.spec))):
            gathered = each * size * sharding.mesh.shape[FSDP]
            if (within := paths.within_layer(path)) is None:
                table = max(table, gathered)
            else:
                layers[within[0]] += gathered // paths.layer_count(path, leaf)
    return base, 2 * max(layers.values(), default=0) + table


def _named_values(jaxpr: Any) -> Iterator[tuple[str, Any]]:
    """Yield `(name, abstract value)` of each `checkpoint_name`, including those in inner jaxprs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            yield equation.params["name"], equation.outvars[0].aval
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _named_values(inner)
