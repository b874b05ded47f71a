"""How much memory a step takes, as far as can be told before anything is compiled, and what the backward pass should keep in it.

Of each layer the backward pass finds again what the policy of remat keeps: its input alone (`full`), the result of attention as well
(`attention`), or the results of its linear modules too (`products`). Chen et al. 2016, "Training Deep Nets with Sublinear Memory
Cost", section 4 (arXiv:1604.06174).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site
from jaxpeft.forward import run
from jaxpeft.hub.loading import Outline, abstract_params
from jaxpeft.quant import FORMS
from jaxpeft.training.head_loss import MOST_LOGITS

USABLE = 0.92
"""Share of a device's memory that a step is planned into: the allocator needs room between its pieces."""
_POLICIES = ("products", "attention", "full")
_MARKS = {"products": ("product", "attention"), "attention": ("attention",), "full": ()}


@dataclass(frozen=True)
class Estimate:
    """What a step keeps in a device's memory, in bytes.

    Attributes:
        base: the frozen leaves, as they are stored.
        trained: the trained leaves, their gradients and the optimizer's two moments, float32.
        kept: activations, by the policy of remat.
        working: the activations of the layer at work and the logits of a chunk.
    """

    base: int
    trained: int
    kept: Mapping[str, int]
    working: int

    def total(self, remat: str) -> int:
        """Gives all of it under a policy."""
        return self.base + self.trained + self.kept[remat] + self.working

    def fastest(self, budget: float) -> str:
        """Gives the policy that computes least again of those that fit into `budget` bytes, `full` where none does."""
        return next((policy for policy in _POLICIES if self.total(policy) <= budget), "full")


def estimate(outline: Outline, trained: int, rows: int, length: int) -> Estimate:
    """Estimates the memory of a step.

    Args:
        outline: of the model.
        trained: how many parameters are trained.
        rows: that a device computes at once.
        length: tokens a row.
    """
    model, options = outline.model, outline.model.options
    one = model.clone(
        config=dataclasses.replace(model.config, num_hidden_layers=1),
        options=dataclasses.replace(options, scan_layers=False, remat="none", attention="xla"),
    )
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    # of a language model the head is left out: its loss is computed in chunks
    asked: dict[str, Any] = {"hidden": True} if options.task == "causal_lm" else {}
    jaxpr = jax.make_jaxpr(lambda params, ids: run(one, params, ids, **asked))(abstract_params(one), ids)
    named = list(_named(jaxpr.jaxpr))
    size = jnp.dtype(options.dtype).itemsize
    stream = rows * length * model.config.hidden_size * size
    layers = model.config.num_hidden_layers
    per_layer = {policy: stream + sum(n for name, n in named if name in marks) for policy, marks in _MARKS.items()}
    vocab = model.config.vocab_size if options.task == "causal_lm" else 0
    return Estimate(
        base=_base(outline),
        trained=16 * trained,
        kept={policy: layers * n for policy, n in per_layer.items()},
        working=2 * per_layer["products"] + 2 * size * min(MOST_LOGITS, rows * length * vocab),
    )


def budget_of(device: Any, given: float | None) -> float | None:
    """Gives how many bytes a step may take, None where nothing tells.

    Args:
        device: whose memory is asked for.
        given: GB that the config allows; None for what the device has.
    """
    if given is not None:
        return given * 1e9
    stats = device.memory_stats() or {}
    return USABLE * stats["bytes_limit"] if "bytes_limit" in stats and device.platform != "cpu" else None


def _base(outline: Outline) -> int:
    sites = outline.quant.sites(outline.abstract) if outline.quant else {}
    return sum(_stored(outline, sites, path, leaf) for path, leaf in paths.walk(outline.abstract))


def _stored(outline: Outline, sites: Mapping[Path, Site], path: Path, leaf: Any) -> int:
    """Gives the bytes of one leaf, as it is stored."""
    if path not in sites or outline.quant is None:
        source = outline.plan.sources.get(path)
        return leaf.size * (source.dtype.itemsize if source else 4)
    form, quant = FORMS[outline.quant.form], outline.quant
    store = partial(form.store, group=quant.group) if form.grouped else form.store
    made = jax.eval_shape(store, jax.ShapeDtypeStruct(leaf.shape[-2:], jnp.float32))
    layers = leaf.size // (leaf.shape[-1] * leaf.shape[-2])
    return layers * sum(part.size * part.dtype.itemsize for part in made.values())


def _named(jaxpr: Any) -> Iterator[tuple[str, int]]:
    """Yields the names that values bear, and their bytes, those in inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            aval = equation.outvars[0].aval
            yield equation.params["name"], aval.size * aval.dtype.itemsize
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from _named(inner)
