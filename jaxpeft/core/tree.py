"""Partitioning and combining parameter trees, and stacking and unrolling their layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree

CORRECTION = "e_score_correction_bias"
"""The leaf of a router that is added to the scores of experts for their choice, and not trained."""
LAYER_SCALAR = "layer_scalar"
"""The leaf by which the output of a layer is multiplied."""
FIXED = frozenset({CORRECTION, LAYER_SCALAR})
"""Leaves of a base that no method trains and that keep their dtype, as buffers of torch do."""


def partition(params: Mapping[str, Any], mask: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Split a tree into the leaves whose mask is True, and the rest.

    The parts are plain nested dicts with only their own leaves, so an optimizer state initialized
    from the first part has no arrays for leaves of the second.

    Args:
        params: nested dict of arrays.
        mask: nested dict of bools with the same structure, from `trainable_mask`.

    Returns:
        `(trainable, frozen)`.

    Raises:
        ValueError: The structures differ; the message names the paths.
    """
    flags = dict(paths.walk(mask))
    items = list(paths.walk(params))
    differing = flags.keys() ^ {path for path, _ in items}
    if differing:
        names = ", ".join(sorted(map(paths.text, differing))[:5])
        raise ValueError(
            f"mask and params have different leaves ({len(differing)}): {names}; make the mask from"
            " params"
        )
    chosen = [(path, leaf) for path, leaf in items if flags[path]]
    others = [(path, leaf) for path, leaf in items if not flags[path]]
    return paths.build(chosen), paths.build(others)


def combine(a: Mapping[str, Any], b: Mapping[str, Any]) -> Tree:
    """Combine two parts of a tree; the inverse of `partition`.

    Args:
        a: nested dict of arrays.
        b: nested dict of arrays, with no leaf in common with `a`.

    Raises:
        ValueError: A leaf is in both parts; the message names it.
    """
    return _combine(a, b, ())


def _combine(a: Mapping[str, Any], b: Mapping[str, Any], prefix: Path) -> Tree:
    out: Tree = dict(a)
    for key, value in b.items():
        if key not in out:
            out[key] = _copy(value)
        elif isinstance(value, Mapping) and isinstance(out[key], Mapping):
            out[key] = _combine(out[key], value, (*prefix, key))
        else:
            raise ValueError(
                f"{paths.text((*prefix, key))} is in both trees; combine needs two disjoint parts"
                " of one tree"
            )
    return {key: _copy(value) for key, value in out.items()}


def _copy(node: Any) -> Any:
    """Copy the dicts but not the arrays, so that no two trees share a dict."""
    return {key: _copy(value) for key, value in node.items()} if isinstance(node, Mapping) else node


def count(tree: Mapping[str, Any]) -> int:
    """Return the number of parameters of a tree, which may be abstract.

    A quantized kernel counts like the unquantized one.
    """
    return sum(kernels.parameters(path[-1], leaf.shape) for path, leaf in paths.walk(tree))


def stack_leaves(leaves: Sequence[Any], layers: tuple[int, ...]) -> Any:
    """Return the leaves of all layers as one leaf.

    Args:
        leaves: one leaf per layer and expert, at least one.
        layers: the sizes of the stacked axes; empty if there are none.
    """
    for size in reversed(layers):  # axis by axis: a program with thousands of inputs compiles long
        leaves = [jnp.stack(leaves[i : i + size]) for i in range(0, len(leaves), size)]
    return leaves[0]


def stack_layers(params: Mapping[str, Any], like: Mapping[str, Any] | None = None) -> Tree:
    """Stack unrolled layers: `layers/0/...`, `layers/1/...` become one `layers/...` with a leading
    layer axis.

    Args:
        params: the tree.
        like: a tree of the scanned model, whose layers are unequal: the layers are stacked as its
            are; None if all layers are equal.

    Raises:
        ValueError: Layers that would be stacked have different leaves.
    """
    out: Tree = {}
    for key, node in params.items():
        if not isinstance(node, Mapping):
            out[key] = node
        elif key in paths.LAYER_CONTAINERS and node and all(child.isdigit() for child in node):
            wanted = (like or {}).get(key) or {}
            names = [name for name in wanted if paths.named_layers(name) is not None]
            out[key] = {name: _stack(node, name, key) for name in names} or _stack(
                node, paths.ALL_LAYERS, key
            )
        else:
            out[key] = stack_layers(node, (like or {}).get(key))
    return out


def _stack(node: Mapping[str, Any], name: str, container: str) -> Tree:
    """Return the leaves of the layers with a name, stacked if there are several."""
    numbers = paths.named_layers(name) or range(len(node))
    layers = [node[str(i)] for i in numbers]
    if name.isdigit():
        return stack_layers(layers[0])
    shapes = [{path: leaf.shape for path, leaf in paths.walk(layer)} for layer in layers]
    for i, other in zip(numbers, shapes, strict=True):
        odd = {
            path
            for path in shapes[0].keys() | other.keys()
            if shapes[0].get(path) != other.get(path)
        }
        if odd:
            raise ValueError(
                f"{container}/{numbers[0]} and {container}/{i} differ at"
                f" {paths.text(sorted(odd)[0])}: layers with different leaves cannot be stacked;"
                " give a tree of the scanned model as `like`, or keep scan_layers=False"
            )
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack_layers(params: Mapping[str, Any]) -> Tree:
    """Unroll stacked layers; the inverse of `stack_layers`."""
    out: Tree = {}
    for key, node in params.items():
        if not isinstance(node, Mapping):
            out[key] = node
        elif key in paths.LAYER_CONTAINERS and node:
            out[key] = _unstack(node)
        else:
            out[key] = unstack_layers(node)
    return out


def _unstack(node: Mapping[str, Any]) -> Tree:
    """Return the layers of a container by their numbers, in their order."""
    found: dict[int, Any] = {}
    for name in node:
        layers = paths.named_layers(name)
        if layers is None:  # all layers are stacked
            found = _layers_of(node, range(next(leaf.shape[0] for _, leaf in paths.walk(node))))
            break
        one = name.isdigit()
        found |= {layers[0]: unstack_layers(node[name])} if one else _layers_of(node[name], layers)
    return {str(number): found[number] for number in sorted(found)}


def _layers_of(stack: Mapping[str, Any], layers: range) -> dict[int, Tree]:
    """Return the leaves of each layer of a stack by its number."""
    return {
        number: jax.tree.map(lambda leaf, i=i: leaf[i], dict(stack))
        for i, number in enumerate(layers)
    }
