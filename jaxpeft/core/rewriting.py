"""A method lifted from one site to a whole tree: its leaves added, and which leaves are trained."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, TargetError, show


def add_adapter(
    method: Method, params: Mapping[str, Any], rng: jax.Array, sites: Sequence[Site] | None = None
) -> Tree:
    """Return a tree with the adapter leaves of a method, and every trainable leaf in float32: see
    `jaxpeft.rewrite`.
    """
    tree = paths.build(list(paths.walk(params)))
    for part in method.parts():
        chosen = chosen_sites(part, params, sites)
        targets.report_coverage(targets.find_sites(params, part.sites.kinds), chosen)
        add_leaves(part, params, tree, rng, chosen)
    mask = dict(paths.walk(trainable_mask(method, tree)))
    return paths.map_with_path(
        lambda path, leaf: kernels.fetch(leaf).astype(jnp.float32) if mask[path] else leaf, tree
    )


def require_numbers(params: Mapping[str, Any]) -> None:
    """Refuse what is no tree, one of which a leaf is no array of NumPy or JAX, or a leaf of the
    base holds whole numbers, truth values or complex ones.

    Args:
        params: a tree, rewritten, quantized or not; abstract leaves will do.

    Raises:
        ConfigError: naming the first such leaf.
    """
    given: Any = params
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"params: must be the nested dict of a model's parameters, is {show(given)}"
        )
    for path, leaf in paths.walk(params):
        keys: tuple[Any, ...] = path
        wrong = next((key for key in keys if not isinstance(key, str)), None)
        if wrong is not None:
            raise ConfigError(
                f"params: the keys of its dicts must be strings, {show(wrong)} is none; write"
                f" {str(wrong)!r}"
            )
        # a tensor of torch has both as well, and a dtype of its own
        if not (
            isinstance(leaf, jax.Array)
            or (hasattr(leaf, "shape") and isinstance(getattr(leaf, "dtype", None), np.dtype))
        ):
            raise ConfigError(
                f"{paths.text(path)}: must be an array, is {show(leaf)} ({type(leaf).__name__})"
            )
        if path[-1] in _FLOATING and not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ConfigError(
                f"{paths.text(path)}: must be an array of floats, is {leaf.dtype}"
                f" {list(leaf.shape)}; a base whose kernels are held in few bits comes from"
                " jaxpeft.quantize or jaxpeft.load(..., quant=...)"
            )


_FLOATING = frozenset({"kernel", "bias", "scale", "embedding"})
"""Leaves of the base that are numbers as they stand."""


def chosen_sites(
    method: Method, params: Mapping[str, Any], sites: Sequence[Site] | None = None
) -> dict[Site, tuple[bool, ...]]:
    """Find the sites that a method adapts, and for each which of its layers.

    Args:
        method: one that is not made of others.
        params: the tree, rewritten or not.
        sites: of a model that is not jaxpeft's own; None to find them in the tree.

    Raises:
        TargetError: the targets do not name sites of this model, or sites of a kind that the method
            cannot adapt.
    """
    found = list(targets.find_sites(params, targets.KINDS) if sites is None else sites)
    wanted = method.where(
        tuple(n for site in found if site.kind in method.sites.kinds for n in site.names)
    )
    if wanted is None:
        return {}
    targets.require_fast_targets(wanted, [name for site in found for name in site.names])
    targets.require_kinds(method.name, wanted, found, method.sites.kinds)
    chosen = targets.resolve(params, wanted, method.sites.kinds, found)
    method.check_sites(
        tuple(n for s, on in chosen.items() for n, yes in zip(s.names, on, strict=True) if yes)
    )
    return chosen


def add_leaves(
    method: Method,
    params: Mapping[str, Any],
    tree: Tree,
    rng: jax.Array,
    chosen: Mapping[Site, tuple[bool, ...]],
) -> None:
    """Put the leaves of one method into a tree whose dicts are its own."""
    for site, on in chosen.items():
        node = paths.get(tree, site.path)
        made = site_leaves(method, site, on, paths.get(params, site.path), rng)
        twice = sorted(made.keys() & node.keys())
        if twice:
            raise ConfigError(
                f"{paths.text(site.path)} would hold two {twice[0]} leaves; let the methods'"
                " targets not overlap"
            )
        node.update(made)
    adapted = tuple(site.one(i) for site, on in chosen.items() for i, yes in enumerate(on) if yes)
    tree.update(
        method.init_root(
            params, adapted, jax.random.fold_in(rng, zlib.crc32(method.name.encode()) & 0x7FFFFFFF)
        )
    )


def site_leaves(
    method: Method, site: Site, on: tuple[bool, ...], base: Leaves, rng: jax.Array
) -> dict[str, Any]:
    """Make the leaves of a site, stacked over its layers; a layer that is not adapted is one of
    zeros.

    Args:
        method: what to add.
        site: where.
        on: which of its layers.
        base: the leaves of its module.
        rng: a key.
    """
    layers: list[dict[str, jax.Array] | None] = []
    for i, (name, wanted) in enumerate(zip(site.names, on, strict=True)):
        key = jax.random.fold_in(rng, zlib.crc32(name.encode()) & 0x7FFFFFFF)
        layers.append(
            method.init(site.one(i), partial(kernel_of, site, base, i), key) if wanted else None
        )
    if not site.layers:
        return dict(layers[0] or {})
    if len({frozenset(layer) for layer in layers if layer is not None}) > 1:
        raise ConfigError(
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, and with these"
            " options some hold other leaves than others; load the model with scan_layers=False"
        )
    sizes = {tuple(leaf.shape for leaf in layer.values()) for layer in layers if layer is not None}
    if len(sizes) > 1 and not method.leaves.pads:
        raise ConfigError(
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, and with these"
            " options their leaves differ in size, which zeros cannot fill up; load the model with"
            " scan_layers=False"
        )
    stacked = _stack_with_padding(layers)
    if not all(on) and not method.leaves.zero_is_base:
        stacked[method.leaves.names[-1]] = jnp.asarray(on)
    return {key: leaf.reshape(*site.layers, *leaf.shape[1:]) for key, leaf in stacked.items()}


def kernel_of(site: Site, base: Leaves, i: int) -> jax.Array:
    """Return the kernel of layer `i` of a site, float32 `[in, out]`, from the leaves of its
    module.
    """
    return kernels.read(layer_of(site, base, i), site.shape, site.order)


def layer_of(site: Site, leaves: Leaves, i: int) -> dict[str, Any]:
    """Return the leaves of layer `i` of a site, those of modules inside it apart."""
    own = {
        key: kernels.fetch(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)
    }
    where = np.unravel_index(i, site.layers) if site.layers else ()
    return {key: leaf[tuple(map(int, where))] for key, leaf in own.items()} if site.layers else own


def _stack_with_padding(layers: list[dict[str, jax.Array] | None]) -> dict[str, jax.Array]:
    """Stack the leaves of all layers, padding with zeros to the largest shape; None is a layer of
    zeros.
    """
    made = [layer for layer in layers if layer is not None]
    out: dict[str, jax.Array] = {}
    for key in made[0]:
        shape = tuple(
            max(sizes) for sizes in zip(*(layer[key].shape for layer in made), strict=True)
        )
        rows = [layer[key] if layer else jnp.zeros(shape, made[0][key].dtype) for layer in layers]
        out[key] = jnp.stack([_pad(row, shape) for row in rows])
    return out


def _pad(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    widths = [(0, n - m) for n, m in zip(shape, row.shape, strict=True)]
    return jnp.pad(row, widths) if any(after for _, after in widths) else row


def trainable_mask(method: Method, params: Mapping[str, Any]) -> Tree:
    """Return for every leaf whether it is trained: what the method trains, `modules_to_save`, and
    the task head.

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
    saved = modules_to_save(method)
    unused = [
        m for m in dict.fromkeys(saved) if not any(targets.is_under(name, [m]) for name in names)
    ]
    if unused:
        stacked = any(paths.layer_axis(path) is not None for path, _ in leaves)
        hint = (
            "; the layers are stacked: to train one of them, load the model with scan_layers=False"
            if stacked
            else ""
        )
        raise TargetError(
            [
                f"modules_to_save: {m!r} names no module of the"
                f" model{hint if any(map(str.isdigit, m.split('.'))) else ''}"
                for m in unused
            ]
        )
    mask = [(path, _trains(method, path, params, leaf)) for path, leaf in leaves]
    if not any(flag for _, flag in mask):
        raise ConfigError(
            f"method {method.name!r} trains nothing here: the model has no head and the method adds"
            " no leaf"
        )
    return paths.build(mask)


def _trains(method: Method, path: Path, params: Mapping[str, Any], leaf: Any) -> bool:
    for part in method.parts():
        if path[-1] in (*part.leaves.names, *part.leaves.root):
            return jnp.issubdtype(leaf.dtype, jnp.floating) and part.trains(path, params)
    whole = paths.is_head(path) or targets.is_under(".".join(path[:-1]), modules_to_save(method))
    wanted = whole or any(part.trains(path, params) for part in method.parts())
    module = paths.get(params, path[:-1])
    if wanted and path[-1] != "bias" and kernels.is_quantized(module):
        raise ConfigError(
            f"{method.name} would train the kernel of {paths.text(path[:-1])}, which is quantized"
            f" (it is held as {kernels.form_of(module)}); load a base that is not"
        )
    return wanted and jnp.issubdtype(leaf.dtype, jnp.floating)


def modules_to_save(method: Method) -> tuple[str, ...]:
    """Return the names of the modules that a method, or one of those that it is made of, trains and
    save whole.
    """
    return tuple(
        dict.fromkeys(name for part in (method, *method.parts()) for name in part.modules_to_save)
    )


def adapted_modules(method: Method, params: Mapping[str, Any]) -> list[Path]:
    """List the modules of a tree that hold the leaves of a method, the root as `()`."""
    markers = {part.leaves.site[0] for part in method.parts() if part.leaves.site}
    markers |= {
        part.leaves.root[0] for part in method.parts() if part.leaves.root and not part.leaves.site
    }
    return [path[:-1] for path, _ in paths.walk(params) if path[-1] in markers]


def adapter_names(method: Method) -> frozenset[str]:
    """Return the names of all leaves that a method adds, to sites and at the root of the tree."""
    return frozenset(
        name for part in method.parts() for name in (*part.leaves.names, *part.leaves.root)
    )


def without_adapter(method: Method, params: Mapping[str, Any]) -> Tree:
    """Drop the adapter leaves: the tree computes as the base, with the leaves of the base that were
    trained as they are now.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
    """
    names = adapter_names(method)
    return paths.build([(path, leaf) for path, leaf in paths.walk(params) if path[-1] not in names])
