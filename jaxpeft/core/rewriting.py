"""Rewrite, trainable mask and merge: a method lifted from one site to a whole tree."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import kernels, paths, targets
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, TargetError


def rewrite(method: Method, params: Mapping[str, Any], rng: jax.Array, *, sites: Sequence[Site] | None = None) -> Tree:
    """Adds the method's adapter leaves to a parameter tree, and makes every trainable leaf float32.

    A leaf depends on `rng` and on its site's Hugging Face name only, so scanned and unrolled layers start from the same
    numbers. Where a stacked site is adapted in some layers only, or with other shapes, the other entries are exact zeros,
    which stay zero in training.

    Args:
        method: what to add.
        params: the base; nothing of it is changed or copied but the trainable leaves that are not float32 yet.
        rng: a key.
        sites: of a model that is not jaxpeft's own, as `jaxpeft.find_sites` gives them; None to find them in the tree.

    Raises:
        TargetError: the targets do not name sites of this model.
        ConfigError: the tree is already rewritten, nothing would be trained, or a stacked bias would be trained for the
            sake of some of its layers.
    """
    tree = paths.build(list(paths.walk(params)))
    present = adapted_modules(method, params)
    if present:
        where = paths.text(present[0]) or "the root of the tree"
        raise ConfigError(f"{where} already holds {method.name} leaves; rewrite the base, or merge first")
    for part in method.parts():
        _add(part, params, tree, rng, chosen_sites(part, params, sites))
    mask = dict(paths.walk(trainable_mask(method, tree)))
    return paths.map_with_path(lambda path, leaf: kernels.near(leaf).astype(jnp.float32) if mask[path] else leaf, tree)


def chosen_sites(
    method: Method, params: Mapping[str, Any], sites: Sequence[Site] | None = None
) -> dict[Site, tuple[bool, ...]]:
    """Finds the sites that a method adapts, and for each which of its layers.

    Args:
        method: one that is not made of others.
        params: the tree, rewritten or not.
        sites: of a model that is not jaxpeft's own; None to find them in the tree.

    Raises:
        TargetError: the targets do not name sites of this model, or sites of a kind that the method cannot adapt.
    """
    found = list(targets.find_sites(params, targets.KINDS) if sites is None else sites)
    wanted = method.where(tuple(n for site in found if site.kind in method.kinds for n in site.names))
    if wanted is None:
        return {}
    targets.require_fast_targets(wanted, [name for site in found for name in site.names])
    targets.require_kinds(method.name, wanted, found, method.kinds)
    chosen = targets.resolve(params, wanted, method.kinds, found)
    method.check_sites(tuple(n for s, on in chosen.items() for n, yes in zip(s.names, on, strict=True) if yes))
    return chosen


def _add(
    method: Method, params: Mapping[str, Any], tree: Tree, rng: jax.Array, chosen: Mapping[Site, tuple[bool, ...]]
) -> None:
    """Puts the leaves of one method into a tree whose dicts are its own."""
    targets.report_coverage(targets.find_sites(params, method.kinds), chosen)
    for site, on in chosen.items():
        node = paths.get(tree, site.path)
        made = site_leaves(method, site, on, paths.get(params, site.path), rng)
        twice = sorted(made.keys() & node.keys())
        if twice:
            raise ConfigError(
                f"{paths.text(site.path)} would hold two {twice[0]} leaves; let the methods' targets not overlap"
            )
        node.update(made)
    adapted = tuple(site.one(i) for site, on in chosen.items() for i, yes in enumerate(on) if yes)
    tree.update(
        method.init_root(params, adapted, jax.random.fold_in(rng, zlib.crc32(method.name.encode()) & 0x7FFFFFFF))
    )


def site_leaves(method: Method, site: Site, on: tuple[bool, ...], base: Leaves, rng: jax.Array) -> dict[str, Any]:
    """Makes the leaves of a site, stacked over its layers; a layer that is not adapted is one of zeros.

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
        layers.append(method.init(site.one(i), partial(kernel_of, site, base, i), key) if wanted else None)
    if not site.layers:
        return dict(layers[0] or {})
    if len({frozenset(layer) for layer in layers if layer is not None}) > 1:
        raise ConfigError(
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, and with these options some hold other leaves "
            "than others; load the model with scan_layers=False"
        )
    sizes = {tuple(leaf.shape for leaf in layer.values()) for layer in layers if layer is not None}
    if len(sizes) > 1 and not method.pads:
        raise ConfigError(
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, and with these options their leaves differ in size, "
            "which zeros cannot fill up; load the model with scan_layers=False"
        )
    stacked = _stack_padded(layers)
    if not all(on) and not method.zero_is_base:
        stacked[method.site_names()[-1]] = jnp.asarray(on)
    return {key: leaf.reshape(*site.layers, *leaf.shape[1:]) for key, leaf in stacked.items()}


def kernel_of(site: Site, base: Leaves, i: int) -> jax.Array:
    """Gives the kernel of layer `i` of a site, float32 `[in, out]`, from the leaves of its module."""
    return kernels.read(layer_of(site, base, i), site.shape, site.order)


def layer_of(site: Site, leaves: Leaves, i: int) -> dict[str, Any]:
    """Gives the leaves of layer `i` of a site, those of modules inside it apart."""
    own = {key: kernels.near(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)}
    where = np.unravel_index(i, site.layers) if site.layers else ()
    return {key: leaf[tuple(map(int, where))] for key, leaf in own.items()} if site.layers else own


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
    saved = modules_to_save(method)
    unused = [m for m in dict.fromkeys(saved) if not any(targets.under(name, [m]) for name in names)]
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
    for part in method.parts():
        if path[-1] in (*part.site_names(), *part.root_names):
            return jnp.issubdtype(leaf.dtype, jnp.floating) and part.trains(path, params)
    whole = paths.is_head(path) or targets.under(".".join(path[:-1]), modules_to_save(method))
    wanted = whole or any(part.trains(path, params) for part in method.parts())
    module = paths.get(params, path[:-1])
    if wanted and path[-1] != "bias" and kernels.is_quantised(module):
        raise ConfigError(
            f"{method.name} would train the kernel of {paths.text(path[:-1])}, which is quantised (it is held as "
            f"{kernels.form_of(module)}); load a base that is not"
        )
    return wanted and jnp.issubdtype(leaf.dtype, jnp.floating)


def modules_to_save(method: Method) -> tuple[str, ...]:
    """Gives the names of the modules that a method, or one of those that it is made of, trains and saves whole."""
    return tuple(dict.fromkeys(name for part in (method, *method.parts()) for name in part.modules_to_save))


def adapted_modules(method: Method, params: Mapping[str, Any]) -> list[Path]:
    """Lists the modules of a tree that hold the leaves of a method, the root as `()`."""
    markers = {part.leaf_names[0] for part in method.parts() if part.leaf_names}
    markers |= {part.root_names[0] for part in method.parts() if part.root_names and not part.leaf_names}
    return [path[:-1] for path, _ in paths.walk(params) if path[-1] in markers]


def adapter_names(method: Method) -> frozenset[str]:
    """Gives the names of all leaves that a method adds, to sites and at the root of the tree."""
    return frozenset(name for part in method.parts() for name in (*part.site_names(), *part.root_names))


def without_adapter(method: Method, params: Mapping[str, Any]) -> Tree:
    """Drops the adapter leaves: the tree computes as the base, with the leaves of the base that were trained as they are now.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
    """
    names = adapter_names(method)
    return paths.build([(path, leaf) for path, leaf in paths.walk(params) if path[-1] not in names])


def merge(
    method: Method, params: Mapping[str, Any], *, sites: Sequence[Site] | None = None, tied: bool | None = None
) -> Tree:
    """Folds the adapter into the base, giving plain params: the inverse of `rewrite` in structure.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
        sites: of a model that is not jaxpeft's own, as given to `rewrite`.
        tied: whether the embedding is the language-model head as well; None for a decoder of jaxpeft's own that has no head.

    Returns:
        The tree without adapter leaves; sums are made in float32 and cast to the base leaf's dtype once.

    Raises:
        ConfigError: the tree holds no leaf of this method: it was never rewritten, or is merged already; or the method
            computes what no plain leaf computes.
    """
    tree = paths.build(list(paths.walk(params)))
    adding = adding_parts(method)
    for part in adding:
        if not part.mergeable:
            raise ConfigError(f"{part.name} cannot be merged: no plain weights compute what it does; keep the adapter")
        if not adapted_modules(part, params):
            raise ConfigError(
                f"nothing to merge: no module holds {part.name} leaves (merged already, or never rewritten)"
            )
    if tied or (tied is None and sites is None and _without_head(params)):
        _require_untied(adding, params)
    roots = {key: tree.pop(key) for part in adding for key in part.root_names if key in tree}
    names = adapter_names(method)
    for site in targets.find_sites(params, targets.KINDS) if sites is None else sites:
        node = paths.get(tree, site.path)
        folded = fold_site(adding, site, node, roots)
        for key in names & node.keys():
            del node[key]
        node.update(folded)
    return tree


def _without_head(params: Mapping[str, Any]) -> bool:
    """Says whether a tree is that of a decoder which has no head but its embedding."""
    found = [path for path, _ in paths.walk(params)]
    return any(path[-2:-1] == ("embed_tokens",) for path in found) and not any(
        path[0] == "lm_head" or paths.is_head(path) for path in found
    )


def _require_untied(adding: Sequence[Method], params: Mapping[str, Any]) -> None:
    """Refuses an adapter that changes an embedding where tokens are looked up, and not where it is the head.

    Raises:
        ConfigError: naming the embedding.
    """
    for path, _ in paths.walk(params):
        for part in adding:
            lookups = part.leaf_names and path[-1] == part.leaf_names[0] and "attend" not in part.hooks
            if lookups and kernels.form_of(paths.get(params, path[:-1])) == "embedding":
                raise ConfigError(
                    f"{paths.text(path[:-1])} is the language-model head as well, and {part.name} changes it where tokens are looked up "
                    "alone, which no one matrix computes: `python -m jaxpeft.export --to merged` gives the head a copy of its own; "
                    "for a model that has no such head, give tied=False"
                )


def fold_site(parts: Sequence[Method], site: Site, node: Leaves, roots: Leaves) -> dict[str, Any]:
    """Gives the base leaves of one site with every adapter in it folded in, in their dtypes; nothing where there is none.

    Args:
        parts: the methods that add leaves, in the order in which they compute.
        site: where.
        node: the leaves of its module, those of its adapters among them.
        roots: the adapters' leaves at the root of the tree.

    Raises:
        ConfigError: an adapter changes a leaf that the module has not, or the kernel is quantised.
    """
    adapters = {name for part in parts for name in part.site_names()}
    before = {key: leaf for key, leaf in node.items() if key not in adapters and not isinstance(leaf, Mapping)}
    left, out = dict(node), dict[str, Any]()
    for part in parts:
        own = {key: left.pop(key) for key in part.site_names() if key in left}  # two parts may be of one method
        if own:
            shared = {key: roots[key] for key in part.root_names if key in roots}
            out |= _folded(part, site, own, shared, {**before, **out}, before if out else None)
    return out


def adding_parts(method: Method) -> list[Method]:
    """Lists the methods that add leaves, in the order in which they compute a site that several of them adapt."""
    from jaxpeft.methods import MARKERS  # they are made of what this package defines

    order = {marker: i for i, marker in enumerate(MARKERS)}
    adding = [part for part in method.parts() if part.leaf_names or part.root_names]
    return sorted(adding, key=lambda part: order.get((part.leaf_names or part.root_names)[0], len(order)))


def _as_base(value: jax.Array, leaf: Any, site: Site, kernel: bool) -> jax.Array:
    """Gives a folded leaf the axes and the dtype of the base's."""
    return (kernels.as_stored(value, leaf, site.order) if kernel else value.reshape(leaf.shape)).astype(leaf.dtype)


def _folded(
    method: Method, site: Site, own: Leaves, shared: Leaves, plain: Leaves, before: Leaves | None
) -> dict[str, Any]:
    """Gives the base leaves of a site with its adapter folded in, layer by layer; `before` are those without any adapter."""
    form = kernels.form_of(plain) or "kernel"
    if form not in ("kernel", "embedding"):
        raise ConfigError(
            f"{paths.text(site.path)} is stored as {form}; jaxpeft.merge_quantised decodes it, or merge into the base that is not quantised"
        )
    layers: list[dict[str, Any]] = []
    for i in range(len(site.names)):
        mine, base = layer_of(site, own, i), layer_of(site, plain, i)
        given = {key: jnp.asarray(leaf, jnp.float32) for key, leaf in base.items()}
        on = mine.pop(method.site_names()[-1], True)
        whole = {**given, "kernel": kernels.read(base, site.shape, site.order)}
        whole |= {"bias": given["bias"].reshape(-1)} if "bias" in given else {}
        whole |= {} if before is None else {"original": kernel_of(site, before, i)}
        folded = {**whole, **method.fold({**shared, **mine}, whole)} if bool(on) else whole
        kept = {form if key == "kernel" else key: value for key, value in folded.items() if key != "original"}
        lost = sorted(kept.keys() - base.keys() - {"kernel"})
        if lost:
            raise ConfigError(
                f"{site.names[i]}: {method.name} needs a {lost[0]} there when it is merged, and the module has none; keep the adapter"
            )
        layers.append({key: _as_base(kept[key], leaf, site, key == form) for key, leaf in base.items() if key in kept})
    if not site.layers:
        return layers[0]
    stacked = {key: jnp.stack([layer[key] for layer in layers]) for key in layers[0]}
    return {key: leaf.reshape(*site.layers, *leaf.shape[1:]) for key, leaf in stacked.items()}
