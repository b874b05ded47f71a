"""Shardings of a tree: from the rules, or derived from a kernel's for adapter and quantized leaves.

Whether a dimension of an adapter leaf, or of a leaf of a quantized kernel, runs along the kernel's
inputs or outputs is found without knowing the method or format: the leaves are traced abstractly
for a site with twice as many inputs, and for one with twice as many outputs. A dimension that
doubles with exactly one of them runs along it.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft.core import paths, targets
from jaxpeft.core.expressions import full_match
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.kernels import QUANTIZED
from jaxpeft.kernels.form import Quantized
from jaxpeft.sharding.rules import Axes, Rule, Rules
from jaxpeft.sharding.sizes import AXES, FSDP

_log = logging.getLogger(__name__)
HOST = "pinned_host"
"""Memory kind of offloaded kernels."""
_STORED = frozenset(name for form in QUANTIZED.values() for name in form.leaves)
Sides = Mapping[str, tuple[int | None, ...]]
"""By leaf name, the side of the kernel that each dimension runs along: 0 inputs, 1 outputs, None
neither.
"""


@dataclass(frozen=True)
class Layout:
    """Shardings of a tree's leaves.

    Attributes:
        shardings: sharding of each leaf, in a tree of the same structure.
        dropped: descriptions of axes that do not divide a dimension and are not used.
    """

    shardings: Tree
    dropped: tuple[str, ...]


def shardings(
    mesh: Mesh, rules: Rules, params: Mapping[str, Any], method: Method | None = None
) -> Tree:
    """Return the sharding of each leaf; takes the arguments of `layout`."""
    return layout(mesh, rules, params, method).shardings


def log_dropped(found: Layout, most: int = 4) -> None:
    """Log the unused axes, one line for all equal layers."""
    alike = list(dict.fromkeys(re.sub(r"/\d+(:\d+:\d+)?/", "/*/", why) for why in found.dropped))
    more = [f"and {len(alike) - most} more"] if len(alike) > most else []
    if alike:
        _log.warning(
            "not sharded, because an axis does not divide a dimension:\n  %s",
            "\n  ".join([*alike[:most], *more]),
        )


def by_path(tree: Mapping[str, Any]) -> Callable[[Path], NamedSharding]:
    """Return the shardings of a tree as a function of the path."""
    return partial(paths.get, tree)


def layout(
    mesh: Mesh, rules: Rules, params: Mapping[str, Any], method: Method | None = None
) -> Layout:
    """Return the layout of a tree.

    Args:
        mesh: device mesh.
        rules: sharding rules.
        params: tree with or without adapters, quantized or not; leaves may be abstract.
        method: method of the adapter leaves; None if there are none.

    Raises:
        ConfigError: no rule matches a leaf, or a user-defined rule does not fit its shape.
    """
    rules.require_fast(paths.text(path) for path, _ in paths.walk(params))
    shards = any(axes for rule in rules.rules for axes in rule.axes)
    derived = dict(_derived_rules(rules, params, method)) if shards else {}
    mask = (
        dict(paths.walk(trainable_mask(method, params)))
        if method is not None and rules.offload
        else {}
    )
    items: list[tuple[Path, NamedSharding]] = []
    dropped: list[str] = []
    for path, leaf in paths.walk(params):
        rule = rules.own(paths.text(path)) or derived.get(path) or rules.find(paths.text(path))
        spec, unused = fit(mesh, rule, path, leaf.shape)
        dropped += unused
        kind = HOST if rules.offload and not mask.get(path) and _is_offloaded(path, leaf) else None
        items.append((path, NamedSharding(mesh, spec, memory_kind=kind)))
    return Layout(paths.build(items), tuple(dropped))


def gathered_codes(found: Layout) -> tuple[tuple[Path, PartitionSpec], ...]:
    """List the quantized leaves of layers sharded along `fsdp`: paths within a layer, and specs
    without `fsdp`.

    If these differ between layers, the paths begin with the name of the layers.

    Args:
        found: layout of a base's leaves, as stored.
    """
    specs: dict[Path, dict[str, PartitionSpec | None]] = {}
    for path, where in paths.walk(found.shardings):
        within = paths.within_layer(path)
        if within is None or path[-1] not in _STORED:
            continue
        layers, rest = within
        entries = tuple(where.spec)[not layers.isdigit() :]
        gathers = FSDP in jax.tree.leaves(entries)
        others = [tuple(axis for axis in _axes(entry) if axis != FSDP) for entry in entries]
        specs.setdefault(rest, {})[layers] = _spec(others) if gathers else None
    return tuple(
        (path, spec)
        for rest, by_layers in specs.items()
        for path, spec in (
            {rest: next(iter(by_layers.values()))}
            if len(set(by_layers.values())) == 1
            else {(layers, *rest): spec for layers, spec in by_layers.items()}
        ).items()
        if spec is not None
    )


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def require_used(rules: Rules, *trees: Mapping[str, Any]) -> None:
    """Reject user-defined rules that match no leaf, such as misspelled ones.

    Args:
        rules: sharding rules.
        *trees: trees of all methods of the run, with adapter leaves; the kernel of a quantized site
            counts as a leaf.

    Raises:
        ConfigError: names the rules, and similar leaves.
    """
    names = {paths.text(path) for params in trees for path, _ in paths.walk(params)}
    names |= {
        paths.text((*site.path, "kernel"))
        for params in trees
        for site in targets.find_sites(params)
    }
    unused = [
        rule.pattern
        for rule in rules.rules
        if rule.own and not any(full_match(rule.pattern, name) for name in names)
    ]
    if unused:
        raise ConfigError(
            [
                f"mesh.rules: {pattern!r} matches no leaf{nearest(pattern, names)}"
                for pattern in unused
            ]
        )


def _is_offloaded(path: Path, leaf: Any) -> bool:
    """Return whether a frozen leaf is offloaded to host memory: kernel matrices of layers are."""
    axes = leaf.ndim - len(paths.stacks(path))
    return (
        paths.layers_at(path) is not None
        and (path[-1] == "kernel" or path[-1] in _STORED)
        and axes > 1
    )


def fit(
    mesh: Mesh, rule: Rule, path: Path, shape: tuple[int, ...]
) -> tuple[PartitionSpec, list[str]]:
    """Fit a rule to the shape of a leaf.

    An axis that does not divide its dimension is not used, except `fsdp`, which only shards storage
    and can move to another dimension of the rule.

    Args:
        mesh: device mesh.
        rule: rule of the leaf.
        path: path of the leaf, for messages.
        shape: shape of the leaf, with its layer axes.

    Returns:
        `(spec, descriptions of unused axes)`.

    Raises:
        ConfigError: the rule is user-defined, and does not fit the shape.
    """
    first = len(shape) - len(rule.axes)
    if first < 0:
        raise ConfigError(
            f"mesh.rules: {rule.pattern!r} has axes for {len(rule.axes)} dimensions, but"
            f" {paths.text(path)} has shape {list(shape)}"
        )
    held: list[list[str]] = [[] for _ in shape]
    dropped: list[str] = []
    for i, axes in enumerate(rule.axes, first):
        for axis in axes:
            size = mesh.shape[axis]
            homes = (
                [i]
                if axis != FSDP or rule.own
                else [i, *(j for j in range(len(shape) - 1, first - 1, -1) if j != i)]
            )
            home = next(
                (j for j in homes if shape[j] % (size * _axes_size(mesh, held[j])) == 0), None
            )
            if size > 1 and home is not None:
                held[home].append(axis)
            elif size > 1 and (shape[i] > 1 or rule.own):
                dropped.append(_undivided_problem(mesh, path, shape, i, [*held[i], axis]))
    if dropped and rule.own:
        raise ConfigError([f"mesh.rules: {rule.pattern!r}: {why}" for why in dropped])
    return _spec(held), dropped


def _spec(held: Sequence[Sequence[str]]) -> PartitionSpec:
    """Return the spec of a leaf from the axes of each dimension."""
    spec = [None if not axes else axes[0] if len(axes) == 1 else tuple(axes) for axes in held]
    while spec and spec[-1] is None:
        spec.pop()
    return PartitionSpec(*spec)


def _axes_size(mesh: Mesh, axes: list[str]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


def _undivided_problem(
    mesh: Mesh, path: Path, shape: tuple[int, ...], i: int, axes: list[str]
) -> str:
    product = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in axes)
    return f"{paths.text(path)} {list(shape)}: {product} does not divide {shape[i]}"


# ----------------------------------------------------------------------------------- derived leaves


def _derived_rules(
    rules: Rules, params: Mapping[str, Any], method: Method | None
) -> Iterator[tuple[Path, Rule]]:
    """Yield rules of leaves that are derived from a kernel's, and of adapter leaves at the root."""
    parts = () if method is None else method.parts()
    known: dict[Any, Sides] = {}
    for site in targets.find_sites(params, targets.KINDS):
        node = {
            key
            for key, leaf in paths.get(params, site.path).items()
            if not isinstance(leaf, Mapping)
        }
        form = next((form for form in QUANTIZED.values() if form.leaves[0] in node), None)
        base = (
            Rule("")
            if site.kind == "norm"
            else rules.find(paths.text((*site.path, _KERNELS[site.kind])))
        )
        if form is not None:
            sides = _stored_sides(form, site.shape)
            # the codes are as large as the kernel, so they must be sharded; a scale that an axis
            # does not divide may be replicated
            yield from (
                (
                    (*site.path, key),
                    _derive(base, sides[key], AXES, own=base.own and key == form.leaves[0]),
                )
                for key in form.leaves
            )
        for part in parts:
            names = node & set(part.leaves.names)
            sides = _sides(part, site, known) if names else {}
            yield from (
                ((*site.path, key), _derive(base, sides.get(key, ()), _FEW)) for key in names
            )
    yield from (
        ((name,), Rule("")) for part in parts for name in part.leaves.root if name in params
    )


_KERNELS = {"linear": "kernel", "embedding": "embedding"}
_FEW = tuple(axis for axis in AXES if axis != FSDP)
"""Axes of adapter leaves: not `fsdp`, since small leaves are faster replicated. Leaves of quantized
kernels use all axes.
"""


def _derive(
    base: Rule, sides: tuple[int | None, ...], allowed: tuple[str, ...], *, own: bool = False
) -> Rule:
    """Derive the rule of a leaf from that of its kernel; no axis is used twice.

    Args:
        base: rule of the kernel; axes before the last two belong to layer dimensions, which the
            leaf shares.
        sides: side of the kernel that each dimension of the leaf runs along.
        allowed: axes that the leaf may use.
        own: whether an axis that does not divide a dimension is an error, as for the kernel.
    """
    kernel: Axes = (*((),) * (2 - len(base.axes)), *base.axes)[-2:]
    found: list[tuple[str, ...]] = [
        tuple(axis for axis in axes if axis in allowed) for axes in base.axes[:-2]
    ]
    taken: set[str] = {axis for axes in found for axis in axes}
    for side in sides:
        axes = (
            ()
            if side is None
            else tuple(axis for axis in kernel[side] if axis in allowed and axis not in taken)
        )
        taken.update(axes)
        found.append(axes)
    return Rule(base.pattern, tuple(found), own)


def _sides(method: Method, site: Site, known: dict[Any, Sides]) -> Sides:
    """Find the side of a kernel that each dimension of the adapter leaves runs along.

    Args:
        method: makes the leaves of a site of one layer.
        site: the site.
        known: cache of results by shape of the site.
    """
    one = site.one(0)
    key = repr(method), site.shape, site.kind, site.path[-2:]
    if key not in known:
        known[key] = _traced_sides(
            lambda shape: _init_abstract(method, dataclasses.replace(one, shape=shape)), site.shape
        )
    return known[key]


@lru_cache(maxsize=1024)
def _stored_sides(form: Quantized, shape: tuple[int, int]) -> Sides:
    """Find the side of a kernel that each dimension of its quantized leaves runs along."""
    return _traced_sides(partial(_store_abstract, form), shape)


def _traced_sides(
    make: Callable[[tuple[int, int]], dict[str, jax.Array]], shape: tuple[int, int]
) -> Sides:
    """Trace the leaves that are made for a kernel's shape, and for twice its inputs and outputs."""
    own, wide, tall = (_shapes(partial(make, each)) for each in _double(shape))
    return {
        name: tuple(
            _side(n, wide.get(name, ()), tall.get(name, ()), i, len(found))
            for i, n in enumerate(found)
        )
        for name, found in own.items()
    }


def _double(shape: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    return shape, (2 * shape[0], shape[1]), (shape[0], 2 * shape[1])


def _shapes(make: Callable[[], dict[str, jax.Array]]) -> dict[str, tuple[int, ...]]:
    return {name: leaf.shape for name, leaf in jax.eval_shape(make).items()}


def _side(n: int, wide: tuple[int, ...], tall: tuple[int, ...], i: int, ndim: int) -> int | None:
    """Return the side that a dimension of size `n` runs along, from the shapes for twice the inputs
    and twice the outputs.
    """
    doubles = [len(shape) == ndim and shape[i] == 2 * n for shape in (wide, tall)]
    return doubles.index(True) if sum(doubles) == 1 else None


def _store_abstract(form: Quantized, shape: tuple[int, int]) -> dict[str, jax.Array]:
    """Make the leaves of a quantized kernel, with a separate scale per input, so that the side of
    scales is detected.
    """
    kernel = jnp.zeros(shape, jnp.float32)
    return form.store(kernel, group=1) if form.grouped else form.store(kernel)


def _init_abstract(method: Method, site: Site) -> dict[str, jax.Array]:
    """Make the adapter leaves of a site."""
    return method.init(site, lambda: jnp.zeros(site.shape, jnp.float32), jax.random.key(0))


# -------------------------------------------------------------------------------------- train state


def state_shardings(
    mesh: Mesh, state: Any, trainable: Mapping[str, Any], where: Mapping[str, Any]
) -> Any:
    """Return the sharding of each array of a train state: arrays of a trainable leaf, such as its
    moments, are sharded like the leaf; others are replicated.

    Args:
        mesh: device mesh.
        state: pytree of arrays, possibly abstract, that contains trees structured like `trainable`.
        trainable: trainable leaves.
        where: shardings of the trainable leaves.
    """
    shapes = {path: leaf.shape for path, leaf in paths.walk(trainable)}
    replicated = NamedSharding(mesh, PartitionSpec())

    def of(keys: tuple[Any, ...], leaf: Any) -> NamedSharding:
        names = tuple(str(getattr(key, "key", "")) for key in keys)
        for start in range(len(names)):
            if shapes.get(names[start:]) == leaf.shape:
                return paths.get(where, names[start:])
        return replicated

    return jax.tree_util.tree_map_with_path(of, state)
