"""Paths of a parameter tree, and the Hugging Face names that they mirror.

A path is a tuple of dict keys, `("model", "layers", "self_attn", "q_proj", "kernel")`. If the
component `layers` (or `layer`) is not followed by a number, the leaves below it are stacked: their
leading axis is the layer. So are the leaves below `experts`: their next axis is the expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Tree = dict[str, Any]
Path = tuple[str, ...]

LAYER_CONTAINERS = frozenset({"layers", "layer", "h", "block", "blocks"})
EXPERTS = "experts"
_TORCH_LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight"}


def walk(tree: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield `(path, leaf)` for every leaf of a nested dict, in the order of its keys."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from walk(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def flatten(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of a nested dict by their paths, joined with dots."""
    return {".".join(map(str, path)): leaf for path, leaf in walk(values)}


def build(items: Iterator[tuple[Path, Any]] | list[tuple[Path, Any]]) -> Tree:
    """Build a nested dict from `(path, leaf)` pairs; the inverse of `walk`."""
    tree: Tree = {}
    for path, leaf in items:
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    return tree


def map_with_path(fn: Callable[[Path, Any], Any], tree: Mapping[str, Any]) -> Tree:
    """Return the tree whose leaf at each path is `fn(path, leaf)`."""
    return build([(path, fn(path, leaf)) for path, leaf in walk(tree)])


def get(tree: Mapping[str, Any], path: Path) -> Any:
    """Return the node or leaf at `path`.

    Raises:
        KeyError: The path does not exist.
    """
    node: Any = tree
    for key in path:
        node = node[key]
    return node


def text(path: Path) -> str:
    """Return a path as text: `model/layers/self_attn/q_proj`."""
    return "/".join(path)


def layers_at(path: Path) -> int | None:
    """Return the index in `path` of the layer container, or None if the leaf is in no layer."""
    return next((i for i, key in enumerate(path[:-1]) if key in LAYER_CONTAINERS), None)


def stacks(path: Path) -> tuple[int, ...]:
    """Return the indices in `path` of the containers whose items are stacked: layers, experts."""
    at = layers_at(path)
    found = () if at is None or path[at + 1].isdigit() else (at,)
    return (*found, *(i for i, key in enumerate(path[:-1]) if key == EXPERTS))


def stack_shape(path: Path, leaf: Any) -> tuple[int, ...]:
    """Return the sizes of the stacked axes of a leaf, which come first; empty without any."""
    return tuple(leaf.shape[: len(stacks(path))])


def hf_names(path: Path, sizes: tuple[int, ...] = ()) -> tuple[str, ...]:
    """Return the Hugging Face names of a module or leaf: one, or one per layer and expert if it is
    stacked.

    Args:
        path: path of a module (`.../q_proj`) or leaf (`.../q_proj/kernel`, in torch `weight`).
        sizes: sizes of its stacked axes.
    """
    parts = [*path[:-1], _TORCH_LEAVES.get(path[-1], path[-1])]
    ends = [at + 1 for at in stacks(path)[: len(sizes)]]
    pieces = [".".join(parts[i:j]) for i, j in itertools.pairwise((0, *ends, len(parts)))]
    places = itertools.product(*(range(n) for n in sizes[: len(ends)]))
    return tuple(
        ".".join(itertools.chain(*zip(pieces, map(str, place), strict=False), pieces[-1:]))
        for place in places
    )


def named_items(path: Path, leaf: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Return the Hugging Face name and the index of each layer and expert of a leaf."""
    sizes = stack_shape(path, leaf)
    places = itertools.product(*(range(n) for n in sizes))
    return list(zip(hf_names(path, sizes), places, strict=True))


def is_head(path: Path) -> bool:
    """Return whether a path belongs to the task head.

    A model with a task is `{backbone: ..., head modules: ...}`. A language-model head is pretrained
    and does not count.
    """
    return path[0] in HEAD_MODULES


PRETRAINED_HEADS = frozenset({"head", "pooler"})
"""Head modules that pretraining may have trained; other models have them inside their backbone."""
HEAD_MODULES = frozenset({"classifier", "score", "pre_classifier"}) | PRETRAINED_HEADS
