"""Folding the adapters of a site into the leaves of the base."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.rewriting import (
    kernel_of,
    layer_of,
)
from jaxpeft.core.targets import Site
from jaxpeft.core.tree import stack_leaves
from jaxpeft.errors import ConfigError


def can_fold(kind: type[Method]) -> bool:
    """Return whether a method can be folded into plain leaves, or adds no leaves."""
    return kind.fold is not Method.fold or kind.leaves.marker is None


def fold_site(parts: Sequence[Method], site: Site, node: Leaves, roots: Leaves) -> dict[str, Any]:
    """Return the base leaves of one site, in their dtypes, with its adapters folded in.

    The result is empty if the site has no adapter.

    Args:
        parts: the methods that add leaves, in the order in which they compute.
        site: the site.
        node: leaves of its module, including adapter leaves.
        roots: the adapters' leaves at the root of the tree.

    Raises:
        ConfigError: An adapter changes a leaf that the module does not have, or the kernel is
            quantized.
    """
    adapters = {name for part in parts for name in part.leaves.names}
    before = {
        key: leaf
        for key, leaf in node.items()
        if key not in adapters and not isinstance(leaf, Mapping)
    }
    remaining, out = dict(node), dict[str, Any]()
    for part in parts:
        # two parts may have the same method
        own = {key: remaining.pop(key) for key in part.leaves.names if key in remaining}
        if own:
            shared = {key: roots[key] for key in part.leaves.root if key in roots}
            out |= _fold_layers(part, site, own, shared, {**before, **out}, before if out else None)
    return out


def parts_that_add(method: Method, markers: Iterable[str]) -> list[Method]:
    """Return the parts of a method that add leaves, in the order in which they compute a site.

    Args:
        method: the method.
        markers: marker leaves of all methods, in the order in which the interceptor applies them.
    """
    order = {marker: i for i, marker in enumerate(markers)}
    adding = [part for part in method.parts() if part.leaves.site or part.leaves.root]
    return sorted(
        adding, key=lambda part: order.get((part.leaves.site or part.leaves.root)[0], len(order))
    )


def _cast_to_base(value: jax.Array, leaf: Any, site: Site, kernel: bool) -> jax.Array:
    """Return a folded leaf with the axes and dtype of the base's leaf."""
    return (
        kernels.to_stored(value, leaf, site.order) if kernel else value.reshape(leaf.shape)
    ).astype(leaf.dtype)


def _fold_layers(
    method: Method, site: Site, own: Leaves, shared: Leaves, plain: Leaves, before: Leaves | None
) -> dict[str, Any]:
    """Return the base leaves of a site with one adapter folded in, layer by layer.

    `before` are the original base leaves if another adapter is already folded in.
    """
    form = kernels.form_of(plain) or "kernel"
    if form not in ("kernel", "embedding"):
        raise ConfigError(
            f"{paths.text(site.path)} is stored as {form}; use jaxpeft.merge_quantized, or merge"
            " into the unquantized base"
        )
    layers: list[dict[str, Any]] = []
    for i in range(len(site.names)):
        mine, base = layer_of(site, own, i), layer_of(site, plain, i)
        wide = {key: jnp.asarray(leaf, jnp.float32) for key, leaf in base.items()}
        on = mine.pop(method.leaves.names[-1], True)
        inputs = {**wide, "kernel": kernels.read(base, site.shape, site.order)}
        inputs |= {"bias": wide["bias"].reshape(-1)} if "bias" in wide else {}
        inputs |= {} if before is None else {"original": kernel_of(site, before, i)}
        folded = {**inputs, **method.fold({**shared, **mine}, inputs)} if bool(on) else inputs
        kept = {
            form if key == "kernel" else key: value
            for key, value in folded.items()
            if key != "original"
        }
        missing = sorted(kept.keys() - base.keys() - {"kernel"})
        if missing:
            raise ConfigError(
                f"{site.names[i]}: merging {method.name} needs a {missing[0]}, but the module has"
                " none; keep the adapter"
            )
        layers.append(
            {
                key: _cast_to_base(kept[key], leaf, site, key == form)
                for key, leaf in base.items()
                if key in kept
            }
        )
    return {key: stack_leaves([layer[key] for layer in layers], site.layers) for key in layers[0]}
