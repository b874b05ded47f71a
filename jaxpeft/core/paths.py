"""Paths of a parameter tree, and the Hugging Face names that they mirror.

A path is a tuple of dict keys, `("model", "layers", "self_attn", "q_proj", "kernel")`. After the
component `layers` (or `layer`), a number names one layer, and a slice such as `3:48:2` every second
layer from 3 to below 48, whose leaves are stacked: their leading axis is the layer. Without either,
the leaves of all layers are stacked. So are the leaves below `experts`: their next axis is the
expert.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Tree = dict[str, Any]
Path = tuple[str, ...]

LAYER_CONTAINERS = frozenset({"layers", "layer", "h", "block", "blocks"})
EXPERTS = "experts"
ALL_LAYERS = ":"
"""The name of the stack of all layers, which has no component in paths."""
_LAYERS = re.compile(r"([0-9]+)(?::([0-9]+):([1-9][0-9]*))?")
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


def layers_name(layers: range) -> str:
    """Return the component of a path that names layers: `3` for one, `3:48:2` for a stack."""
    return str(layers[0]) if len(layers) == 1 else f"{layers.start}:{layers.stop}:{layers.step}"


def named_layers(key: str) -> range | None:
    """Return the layers that a component of a path names, or None if it names none."""
    found = _LAYERS.fullmatch(key)
    if found is None:
        return None
    start = int(found[1])
    return range(start, int(found[2]), int(found[3])) if found[2] else range(start, start + 1)


def within_layer(path: Path) -> tuple[str, Path] | None:
    """Split a path in a layer into the name of the layers and the rest; None outside of layers.

    The name is `ALL_LAYERS` if the leaves of all layers are stacked.
    """
    at = layers_at(path)
    if at is None:
        return None
    key, *rest = path[at + 1 :]
    return (ALL_LAYERS, (key, *rest)) if named_layers(key) is None else (key, tuple(rest))


def layer_count(path: Path, leaf: Any) -> int:
    """Return the number of layers of a leaf in a layer: several if they are stacked."""
    within = within_layer(path)
    return 1 if within is None or within[0].isdigit() else leaf.shape[0]


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
    choices: list[Sequence[str]] = [[part] for part in parts]
    for at, size in reversed(list(zip(stacks(path), sizes, strict=False))):
        layers = None if path[at] == EXPERTS else named_layers(path[at + 1])
        numbers = list(map(str, range(size) if layers is None else layers))
        choices[at + 1 : at + 1 + (layers is not None)] = [numbers]
    return tuple(map(".".join, itertools.product(*choices)))


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
