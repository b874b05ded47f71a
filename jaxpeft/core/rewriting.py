"""Lifting a method from one site to a tree: adding its leaves, and the mask of trained leaves."""

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
from jaxpeft.core.expert_sites import adapts_experts
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.core.tree import FIXED, stack_leaves
from jaxpeft.errors import ConfigError, TargetError, show


def add_adapter(
    method: Method, params: Mapping[str, Any], rng: jax.Array, sites: Sequence[Site] | None = None
) -> Tree:
    """Return a tree with the adapter leaves of a method, and all trainable leaves in float32.

    See `jaxpeft.rewrite`.
    """
    tree = paths.build(list(paths.walk(params)))
    for part in method.parts():
        chosen = chosen_sites(part, params, sites)
        targets.report_coverage(targets.find_sites(params, part.sites.kinds), chosen)
        # not those of `where`, to which a method may add
        excluded: str | tuple[str, ...] = getattr(part, "exclude", ())
        found = targets.find_sites(params, targets.KINDS) if sites is None else sites
        targets.warn_of_unused(f"{part.name}.exclude", excluded, found)
        add_leaves(part, params, tree, rng, chosen)
    mask = dict(paths.walk(trainable_mask(method, tree)))
    return paths.map_with_path(
        lambda path, leaf: kernels.fetch(leaf).astype(jnp.float32) if mask[path] else leaf, tree
    )


def require_numbers(params: Mapping[str, Any]) -> None:
    """Raise an error unless params is a tree of NumPy or JAX arrays, with a floating base.

    Args:
        params: a tree, rewritten or quantized or neither; its leaves may be abstract.

    Raises:
        ConfigError: A leaf is invalid; it names the first one.
    """
    tree: Any = params
    if not isinstance(tree, Mapping):
        raise ConfigError(
            f"params: must be the nested dict of a model's parameters, is {show(tree)}"
        )
    for path, leaf in paths.walk(params):
        keys: tuple[Any, ...] = path
        wrong = next((key for key in keys if not isinstance(key, str)), None)
        if wrong is not None:
            raise ConfigError(
                f"params: the keys of its dicts must be strings, not {show(wrong)}; use"
                f" {str(wrong)!r}"
            )
        # torch tensors also have shape and dtype, but not a NumPy dtype
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
                f" {list(leaf.shape)}; to quantize a base, use jaxpeft.quantize or"
                " jaxpeft.load(..., quant=...)"
            )


_FLOATING = frozenset({"kernel", "bias", "scale", "embedding"}) | FIXED
"""Leaves of the base that are not quantized."""


def chosen_sites(
    method: Method, params: Mapping[str, Any], sites: Sequence[Site] | None = None
) -> dict[Site, tuple[bool, ...]]:
    """Return the sites that a method adapts, with a flag for each of their layers.

    Args:
        method: a method that is not mixed.
        params: the tree, rewritten or not.
        sites: sites of a model that is not jaxpeft's own; None to find them in the tree.

    Raises:
        TargetError: The targets match no sites of this model, or sites of a kind that the method
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
    _require_experts(method, wanted, chosen)
    if not adapts_experts(type(method)):
        chosen = {site: on for site, on in chosen.items() if not site.experts}
    method.check_sites(
        tuple(n for s, on in chosen.items() for n, yes in zip(s.names, on, strict=True) if yes)
    )
    return chosen


def _require_experts(
    method: Method, wanted: targets.Targets, chosen: Mapping[Site, tuple[bool, ...]]
) -> None:
    """Raise an error if a method is to adapt experts and cannot.

    Raises:
        TargetError: It cannot adapt experts at all, or not with these options.
    """
    site = next((site for site in chosen if site.experts), None)
    if site is None:
        return
    if not adapts_experts(type(method)):
        if not targets.is_keyword(wanted.targets) or all(each.experts for each in chosen):
            raise TargetError(f"targets: {method.name} cannot adapt experts, such as {site.name}")
    elif getattr(method, "dropout", 0) and method.sites.kinds:
        raise TargetError(
            f"{method.name}.dropout: is {method.dropout:g}, but the inputs of experts have no"  # pyright: ignore[reportAttributeAccessIssue]
            f" dropout; set it to 0, or exclude the experts, such as {site.name}"
        )


def add_leaves(
    method: Method,
    params: Mapping[str, Any],
    tree: Tree,
    rng: jax.Array,
    chosen: Mapping[Site, tuple[bool, ...]],
) -> None:
    """Add the leaves of one method to a tree, in place."""
    adapted = tuple(site.one(i) for site, on in chosen.items() for i, yes in enumerate(on) if yes)
    placed = method.over(adapted)
    for site, on in chosen.items():
        node = paths.get(tree, site.path)
        leaves = site_leaves(placed, site, on, paths.get(params, site.path), rng)
        twice = sorted(leaves.keys() & node.keys())
        if twice:
            raise ConfigError(
                f"{paths.text(site.path)} would have two {twice[0]} leaves; use targets that do not"
                " overlap"
            )
        node.update(leaves)
    tree.update(
        method.init_root(
            params, adapted, jax.random.fold_in(rng, zlib.crc32(method.name.encode()) & 0x7FFFFFFF)
        )
    )


def site_leaves(
    method: Method, site: Site, on: tuple[bool, ...], base: Leaves, rng: jax.Array
) -> dict[str, Any]:
    """Initialize the leaves of a site, stacked over its layers, with zeros for unadapted layers.

    Args:
        method: the method.
        site: the site.
        on: whether each of its layers is adapted.
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
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, but with these"
            " options their leaves differ; load the model with scan_layers=False"
        )
    sizes = {tuple(leaf.shape for leaf in layer.values()) for layer in layers if layer is not None}
    if len(sizes) > 1 and not method.leaves.pads:
        raise ConfigError(
            f"{method.name}: the layers of {paths.text(site.path)} are stacked, but with these"
            " options their leaves have different sizes, which cannot be padded; load the model"
            " with scan_layers=False"
        )
    stacked = _stack_with_padding(layers, site.layers)
    if not all(on) and not method.leaves.zero_is_base:
        stacked[method.leaves.names[-1]] = jnp.asarray(on).reshape(site.layers)
    return stacked


def kernel_of(site: Site, base: Leaves, i: int) -> jax.Array:
    """Return the float32 kernel `[in, out]` of layer `i` of a site, from its module's leaves."""
    return kernels.read(layer_of(site, base, i), site.shape, site.order)


def layer_of(site: Site, leaves: Leaves, i: int) -> dict[str, Any]:
    """Return the leaves of layer `i` of a site, without those of submodules."""
    own = {
        key: kernels.fetch(leaf) for key, leaf in leaves.items() if not isinstance(leaf, Mapping)
    }
    return {key: leaf[site.index(i)] for key, leaf in own.items()} if site.layers else own


def _stack_with_padding(
    layers: list[dict[str, jax.Array] | None], sizes: tuple[int, ...]
) -> dict[str, jax.Array]:
    """Stack the leaves of all layers, zero-padded to the largest shape; None is a zero layer."""
    adapted = [layer for layer in layers if layer is not None]
    out: dict[str, jax.Array] = {}
    for key in adapted[0]:
        shape = tuple(
            max(sizes) for sizes in zip(*(layer[key].shape for layer in adapted), strict=True)
        )
        rows = [
            layer[key] if layer else jnp.zeros(shape, adapted[0][key].dtype) for layer in layers
        ]
        out[key] = stack_leaves([_pad(row, shape) for row in rows], sizes)
    return out


def _pad(row: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    widths = [(0, n - m) for n, m in zip(shape, row.shape, strict=True)]
    return jnp.pad(row, widths) if any(after for _, after in widths) else row


def trainable_mask(method: Method, params: Mapping[str, Any]) -> Tree:
    """Return whether each leaf is trained: by the method, in `modules_to_save`, or in the task
    head.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree; its leaves may be abstract.

    Returns:
        A nested dict of bools with the structure of `params`.

    Raises:
        ConfigError: There are no trainable parameters.
        TargetError: An entry of `modules_to_save` matches no module.
    """
    leaves = list(paths.walk(params))
    names = {".".join(path[:-1]) for path, _ in leaves}
    saved = modules_to_save(method)
    unused = [
        m for m in dict.fromkeys(saved) if not any(targets.is_under(name, [m]) for name in names)
    ]
    if unused:
        stacked = any(paths.stacks(path) for path, _ in leaves)
        hint = (
            "; the layers are stacked: to train only one, load the model with scan_layers=False"
            if stacked
            else ""
        )
        raise TargetError(
            [
                f"modules_to_save: {m!r} matches no module of the"
                f" model{hint if any(map(str.isdigit, m.split('.'))) else ''}"
                for m in unused
            ]
        )
    mask = [(path, _trains(method, path, params, leaf)) for path, leaf in leaves]
    if not any(flag for _, flag in mask):
        why = (
            "the tree has none of its leaves; rewrite the base with it first"
            if any(part.leaves.trained for part in method.parts())
            else "the model has no head, and none of the leaves that the method trains"
        )
        raise ConfigError(f"method {method.name!r} has no trainable parameters: {why}")
    return paths.build(mask)


def _trains(method: Method, path: Path, params: Mapping[str, Any], leaf: Any) -> bool:
    if path[-1] in FIXED:
        return False
    for part in method.parts():
        if path[-1] in (*part.leaves.names, *part.leaves.root):
            return jnp.issubdtype(leaf.dtype, jnp.floating) and part.trains(path, params)
    saved = paths.is_head(path) or targets.is_under(".".join(path[:-1]), modules_to_save(method))
    wanted = saved or any(part.trains(path, params) for part in method.parts())
    module = paths.get(params, path[:-1])
    if wanted and path[-1] != "bias" and kernels.is_quantized(module):
        raise ConfigError(
            f"{method.name} would train the kernel of {paths.text(path[:-1])}, which is quantized"
            f" (stored as {kernels.form_of(module)}); load an unquantized base"
        )
    return wanted and jnp.issubdtype(leaf.dtype, jnp.floating)


def modules_to_save(method: Method) -> tuple[str, ...]:
    """Return the modules that a method, or one of its parts, trains and saves in full."""
    return tuple(
        dict.fromkeys(name for part in (method, *method.parts()) for name in part.modules_to_save)
    )


def adapted_modules(method: Method, params: Mapping[str, Any]) -> list[Path]:
    """List the modules of a tree that have leaves of a method; the root is `()`."""
    markers = {part.leaves.site[0] for part in method.parts() if part.leaves.site}
    markers |= {
        part.leaves.root[0] for part in method.parts() if part.leaves.root and not part.leaves.site
    }
    return [path[:-1] for path, _ in paths.walk(params) if path[-1] in markers]


def adapter_names(method: Method) -> frozenset[str]:
    """Return the names of all leaves that a method adds to sites and to the root of the tree."""
    return frozenset(
        name for part in method.parts() for name in (*part.leaves.names, *part.leaves.root)
    )


def without_adapter(method: Method, params: Mapping[str, Any]) -> Tree:
    """Return the tree without adapter leaves; trained leaves of the base keep their values.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
    """
    names = adapter_names(method)
    return paths.build([(path, leaf) for path, leaf in paths.walk(params) if path[-1] not in names])
