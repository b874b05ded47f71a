"""Merge: what a method has added, folded into the leaves of the base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import (
    adapted_modules,
    adapter_names,
    add_leaves,
    chosen_sites,
    kernel_of,
    layer_of,
    markers,
    require_numbers,
)
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError


def merge(
    method: Method, params: Mapping[str, Any], *, sites: Sequence[Site] | None = None, tied: bool | None = None
) -> Tree:
    """Folds the adapter into the base, giving plain params: the inverse of `rewrite` in structure.

    Args:
        method: the method that rewrote `params`. Its options are compared by the leaves that they make; the scaling is that of the
            tree's own leaf, so another `alpha` or `rslora` than it was rewritten with changes nothing.
        params: the rewritten tree.
        sites: of a model that is not jaxpeft's own, as given to `rewrite`.
        tied: whether the embedding is the language-model head as well; None for a decoder of jaxpeft's own that has no head.

    Returns:
        The tree without adapter leaves; sums are made in float32 and cast to the base leaf's dtype once.

    Raises:
        ConfigError: the tree holds no leaf of this method: it was never rewritten, or is merged already; or leaves that the
            method with these options does not make; or the method computes what no plain leaf computes.
    """
    require_numbers(params)
    tree = paths.build(list(paths.walk(params)))
    adding = adding_parts(method)
    for part in adding:
        if not part.mergeable:
            raise ConfigError(f"{part.name} cannot be merged: no plain weights compute what it does; keep the adapter")
        if not adapted_modules(part, params):
            raise ConfigError(
                f"nothing to merge: no module holds {part.name} leaves (merged already, or never rewritten)"
            )
    _require_made_by(method, params, sites)
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


def _require_made_by(method: Method, params: Mapping[str, Any], sites: Sequence[Site] | None) -> None:
    """Refuse a tree whose adapter leaves are not those that a method makes, by their paths and shapes.

    Larger ones are those of a bank, which holds adapters of several ranks, where what they have more is zeros.

    Raises:
        ConfigError: naming the first leaf that is not.
        TargetError: the method's targets do not name sites of this tree.
    """
    names = {
        name
        for kind in (*markers().values(), *map(type, method.parts()))
        for name in (*kind.site_names(), *kind.root_names)
    }
    held = {path: leaf for path, leaf in paths.walk(params) if path[-1] in names}
    base = paths.build([(path, leaf) for path, leaf in paths.walk(params) if path not in held])

    def made() -> Tree:
        tree = paths.build(list(paths.walk(base)))
        for part in method.parts():
            add_leaves(part, base, tree, jax.random.key(0), chosen_sites(part, base, sites))
        return tree

    wanted = {path: leaf for path, leaf in paths.walk(jax.eval_shape(made)) if path[-1] in names}
    fix = f"merge with the {method.name} that rewrote the tree, its options and targets the same"
    for path in sorted(held.keys() | wanted.keys()):
        if path not in wanted:
            raise ConfigError(f"{paths.text(path)}: {method.name} with these options does not make this leaf; {fix}")
        if path not in held:
            raise ConfigError(
                f"{paths.text(path)}: {method.name} with these options makes this leaf, and it is not there; {fix}"
            )
        shape, own = wanted[path].shape, held[path]
        if shape != own.shape and not (method.rank_pads and _is_padded(own, shape)):
            raise ConfigError(
                f"{paths.text(path)}: has shape {list(own.shape)}, and {method.name} with these options makes {list(shape)}; {fix}"
            )


def _is_padded(leaf: Any, shape: tuple[int, ...]) -> bool:
    """Return whether a leaf is one of the given shape and zeros behind it; of a traced one it is not known, and so it may."""
    if len(shape) != leaf.ndim or any(n > m for n, m in zip(shape, leaf.shape, strict=True)):
        return False
    if isinstance(leaf, jax.core.Tracer):
        return True
    inside = tuple(slice(n) for n in shape)
    return int(jnp.count_nonzero(leaf)) == int(jnp.count_nonzero(leaf[inside]))


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
    order = {marker: i for i, marker in enumerate(markers())}
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
