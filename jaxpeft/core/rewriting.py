"""Rewrite, trainable mask and merge: a method lifted from one site to a whole tree."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths, targets
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, TargetError


def rewrite(method: Method, params: Mapping[str, Any], rng: jax.Array) -> Tree:
    """Adds the method's adapter leaves to a parameter tree, and makes every trainable leaf float32.

    A leaf depends on `rng` and on its site's Hugging Face name only, so scanned and unrolled layers start from the same
    numbers. Where a stacked site is adapted in some layers only, or with other shapes, the other entries are exact zeros,
    which stay zero in training.

    Args:
        method: what to add.
        params: the base; nothing of it is changed or copied but the trainable leaves that are not float32 yet.
        rng: a key.

    Raises:
        TargetError: the targets do not name sites of this model.
        ConfigError: the tree is already rewritten, nothing would be trained, or a stacked bias would be trained for the
            sake of some of its layers.
    """
    wanted = method.where()
    tree = paths.build(list(paths.walk(params)))
    if wanted is not None:
        present = adapted_modules(method, params)
        if present:
            raise ConfigError(
                f"{paths.text(present[0])} already holds {method.name} leaves; rewrite the base, or merge first"
            )
        chosen = targets.resolve(params, wanted)
        method.check_sites(tuple(n for s, on in chosen.items() for n, yes in zip(s.names, on, strict=True) if yes))
        for site, on in chosen.items():
            _require_separable(method, site, on, paths.get(params, site.path))
            paths.get(tree, site.path).update(_site_leaves(method, site, on, paths.get(params, site.path), rng))
    mask = dict(paths.walk(trainable_mask(method, tree)))
    return paths.map_with_path(lambda path, leaf: leaf.astype(jnp.float32) if mask[path] else leaf, tree)


def _require_separable(method: Method, site: Site, on: tuple[bool, ...], base: Leaves) -> None:
    """Refuses to train a stacked bias for the sake of some of its layers: the others would be trained with it."""
    path = (*site.path, "bias")
    of_adapted = method.trains(path, dict.fromkeys(method.leaf_names)) and not method.trains(path, {})
    if "bias" in base and of_adapted and not all(on):
        raise ConfigError(
            f"{method.name}: the biases of {paths.text(site.path)} are one stacked leaf, and {sum(on)} of its {len(on)} "
            "layers are adapted; adapt all of them, or load the model with scan_layers=False"
        )


def _site_leaves(method: Method, site: Site, on: tuple[bool, ...], base: Leaves, rng: jax.Array) -> dict[str, Any]:
    layers: list[dict[str, jax.Array] | None] = []
    for i, (name, wanted) in enumerate(zip(site.names, on, strict=True)):
        own = {k: v[i] for k, v in base.items() if not isinstance(v, Mapping)} if site.stacked else base
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        layers.append(method.init(name, site, own, key) if wanted else None)
    return _stack_padded(layers) if site.stacked else dict(layers[0] or {})


def _stack_padded(layers: list[dict[str, jax.Array] | None]) -> dict[str, jax.Array]:
    """Stacks the leaves of all layers, padding with zeros to the largest shape; None is a layer of zeros."""
    made = [layer for layer in layers if layer is not None]
    out: dict[str, jax.Array] = {}
    for key in made[0]:
        shape = tuple(max(sizes) for sizes in zip(*(layer[key].shape for layer in made), strict=True))
        rows = [layer[key] if layer else jnp.zeros(shape, made[0][key].dtype) for layer in layers]
        out[key] = jnp.stack([_pad(row, shape) for row in rows])
    return out


def _pad(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    widths = [(0, n - m) for n, m in zip(shape, row.shape, strict=True)]
    return jnp.pad(row, widths) if any(after for _, after in widths) else row


def trainable_mask(method: Method, params: Mapping[str, Any]) -> Tree:
    """Says for every leaf whether it is trained: what the method trains, `modules_to_save`, and the task head.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree; abstract leaves will do.

    Returns:
        A nested dict of bools with the structure of `params`.

    Raises:
        ConfigError: nothing would be trained.
        TargetError: an entry of `modules_to_save` names no module.
    """
    leaves = list(paths.walk(params))
    names = {".".join(path[:-1]) for path, _ in leaves}
    unused = [m for m in method.modules_to_save if not any(targets.under(name, [m]) for name in names)]
    if unused:
        stacked = any(paths.layer_axis(path) is not None for path, _ in leaves)
        hint = (
            "; the layers are stacked: to train one of them, load the model with scan_layers=False" if stacked else ""
        )
        raise TargetError(
            [
                f"modules_to_save: {m!r} names no module of the model{hint if any(map(str.isdigit, m.split('.'))) else ''}"
                for m in unused
            ]
        )
    mask = [(path, _trains(method, path, params, leaf)) for path, leaf in leaves]
    if not any(flag for _, flag in mask):
        raise ConfigError(
            f"method {method.name!r} trains nothing here: the model has no head and the method adds no leaf"
        )
    return paths.build(mask)


def _trains(method: Method, path: Path, params: Mapping[str, Any], leaf: Any) -> bool:
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        return False
    adapter_leaf = path[-1] in method.leaf_names
    whole = paths.is_head(path) or targets.under(".".join(path[:-1]), method.modules_to_save)
    return (whole and not adapter_leaf) or method.trains(path, paths.get(params, path[:-1]))


def adapted_modules(method: Method, params: Mapping[str, Any]) -> list[Path]:
    """Lists the modules of a tree that hold the method's leaves."""
    marker = method.leaf_names[:1]
    return [path[:-1] for path, _ in paths.walk(params) if path[-1:] == marker]


def merge(method: Method, params: Mapping[str, Any]) -> Tree:
    """Folds the adapter into the base, giving plain params: the inverse of `rewrite` in structure.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.

    Returns:
        The tree without adapter leaves; sums are made in float32 and cast to the base leaf's dtype once.

    Raises:
        ConfigError: the tree holds no leaf of this method: it was never rewritten, or is merged already.
    """
    tree = paths.build(list(paths.walk(params)))
    modules = adapted_modules(method, params)
    if method.leaf_names and not modules:
        raise ConfigError(
            f"nothing to merge: no module holds {method.name} leaves (merged already, or never rewritten)"
        )
    for path in modules:
        node = paths.get(tree, path)
        folded = method.fold(dict(node))
        node.clear()
        node.update({key: value for key, value in folded.items() if key not in method.leaf_names})
    return tree
