"""Checks of a rewritten tree, its method, and the tensors of an adapter file against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths, targets
from jaxpeft.core.method import Method
from jaxpeft.core.rewriting import chosen_sites, layer_of
from jaxpeft.core.targets import Site
from jaxpeft.hub.adapters.tensors import Array, adapted_names, find_adapted, whole_tensors


def mismatches(method: Method, params: Mapping[str, Any]) -> list[str]:
    """List where a rewritten tree differs from what the method makes, so that it cannot be saved.

    Args:
        method: the method to save the tree as.
        params: the rewritten tree.
    """
    problems = [problem for part in method.parts() for problem in _root_mismatches(part, params)]
    for part in (part for part in method.parts() if part.leaves.site):
        chosen = chosen_sites(part, params)
        alike = [
            other
            for other in method.parts()
            if other is not part and other.leaves.site == part.leaves.site
        ]
        elsewhere = {name for other in alike for name in adapted_names(other, params)}
        fixed = _derived_leaves(
            part, [site.one(i) for site, on in chosen.items() for i, yes in enumerate(on) if yes]
        )
        for site in targets.find_sites(params, targets.KINDS):
            leaves = paths.get(params, site.path)
            present = {key: leaves[key] for key in part.leaves.site if key in leaves}
            on = chosen.get(site, (False,) * len(site.names))
            for i, (name, wanted) in enumerate(zip(site.names, on, strict=True)):
                if name in elsewhere:
                    continue
                if present:
                    problems += _site_mismatches(
                        part, site.one(i), fixed.get(name), layer_of(site, present, i)
                    )
                elif wanted:
                    problems.append(f"{name}: is not adapted in the tree")
    return problems


def _root_mismatches(method: Method, params: Mapping[str, Any]) -> list[str]:
    """Compare the leaves at the root with those that the method makes."""
    if not method.leaves.root:
        return []
    sites = tuple(
        site.one(i)
        for site, on in chosen_sites(method, params).items()
        for i, yes in enumerate(on)
        if yes
    )
    made = jax.eval_shape(
        partial(method.init_root, params, sites), jax.eval_shape(lambda: jax.random.key(0))
    )
    wanted = {key: list(leaf.shape) for key, leaf in made.items()}
    present = {key: list(params[key].shape) for key in method.leaves.root if key in params}
    return [
        f"{key}: is {present.get(key, 'missing')} in the tree, the method makes"
        f" {wanted.get(key, 'none')}"
        for key in method.leaves.root
        if present.get(key) != wanted.get(key)
    ]


def _derived_leaves(method: Method, sites: Sequence[Site]) -> dict[str, dict[str, Array]]:
    """Return the leaves that depend on the options alone, by the names of site and leaf.

    They are computed in one program, in which XLA eliminates unused work such as decompositions of
    kernels.
    """

    def derive(rng: jax.Array) -> dict[str, dict[str, jax.Array]]:
        fresh = {
            site.name: method.init(site, partial(jnp.ones, site.shape, jnp.float32), rng)
            for site in sites
        }
        return {
            name: {key: leaf for key, leaf in leaves.items() if _is_derived(method, key, leaf)}
            for name, leaves in fresh.items()
        }

    return jax.tree.map(np.asarray, jax.jit(derive)(jax.random.key(0)))


def _is_derived(method: Method, key: str, like: Any) -> bool:
    return key not in method.leaves.trained and (
        (_is_integer(like) and key not in method.peft.tensors) or not like.shape
    )


def _site_mismatches(
    method: Method, site: Site, fixed: Mapping[str, Array] | None, leaves: Mapping[str, Any]
) -> list[str]:
    """Compare a site's leaves of one layer with the method's; `fixed` is None if it has none."""
    if fixed is None:
        trained = [
            key for key in leaves if key in method.leaves.trained and np.asarray(leaves[key]).any()
        ]
        return (
            [f"{site.name}: has {trained[0]} in the tree, but the method does not adapt it"]
            if trained
            else []
        )
    fresh = jax.eval_shape(
        partial(method.init, site, partial(jnp.zeros, site.shape, jnp.float32)),
        jax.eval_shape(lambda: jax.random.key(0)),
    )
    if fresh.keys() != leaves.keys() - {method.leaves.names[-1]}:
        odd = ", ".join(sorted(fresh.keys() ^ leaves.keys()))
        return [f"{site.name}: differs from the method's leaves in {odd}"]
    for key, like in fresh.items():
        leaf = np.asarray(leaves[key])
        inside = tuple(slice(0, n) for n in like.shape)
        rest = leaf.copy()
        rest[inside] = 0
        if leaf[inside].shape != like.shape or rest.any():
            used = [
                int(
                    np.flatnonzero(leaf.any(tuple(b for b in range(leaf.ndim) if b != a))).max(
                        initial=-1
                    )
                )
                + 1
                for a in range(leaf.ndim)
            ]
            return [
                f"{site.name}: {key} is {used} in the tree, the method makes {list(like.shape)}"
            ]
        if key in fixed:
            other = ~np.isclose(leaf[inside], fixed[key], rtol=1e-5)
            if other.any():
                is_, makes = leaf[inside][other][0], fixed[key][other][0]
                return [f"{site.name}: {key} is {is_:g} in the tree, the method makes {makes:g}"]
    return []


def _expected_leaves(method: Method, params: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
    wanted: dict[str, jax.ShapeDtypeStruct] = {}
    for entry in whole_tensors(method, params):
        shape = paths.get(params, entry.path).shape[len(entry.index) :]
        wanted[entry.name] = jax.ShapeDtypeStruct(
            shape[::-1] if entry.transposed else shape, jnp.float32
        )
    for entry in find_adapted(method, params):
        wanted |= entry.tensors()
    return wanted


def differences(method: Method, params: Mapping[str, Any], tensors: Mapping[str, Any]) -> list[str]:
    """List every tensor of an adapter file that is missing, extra, misshaped or not numeric.

    Floating-point tensors are accepted in place of integers, since PEFT writes them on Windows.
    """
    wanted = _expected_leaves(method, params)
    problems = [f"missing: {name}" for name in wanted if name not in tensors]
    problems += [f"extra: {name}" for name in tensors if name not in wanted]
    for name, tensor in tensors.items():
        floating = jnp.issubdtype(tensor.dtype, jnp.floating) and tensor.dtype.itemsize >= 2
        if (
            name in wanted
            and not floating
            and not (_is_integer(tensor) and _is_integer(wanted[name]))
        ):
            problems.append(f"not floating: {name} is {tensor.dtype}")
    for name, like in wanted.items():
        if name in tensors and tuple(tensors[name].shape) != like.shape:
            shape = list(tensors[name].shape)
            problems.append(f"misshaped: {name} is {shape}, must be {list(like.shape)}")
    return problems


def _is_integer(tensor: Any) -> bool:
    return bool(jnp.issubdtype(tensor.dtype, jnp.integer))


def wrong_numbers(
    method: Method, params: Mapping[str, Any], tensors: Mapping[str, Array]
) -> list[str]:
    """List the tensors with invalid values; their names and shapes are already checked."""
    problems = [
        f"not finite: {name}" for name, tensor in tensors.items() if not np.isfinite(tensor).all()
    ]
    for entry in find_adapted(method, params):
        if entry.site.path:
            problems += [
                entry.prefix + why
                for why in entry.method.peft.wrong_numbers(
                    entry.method, entry.site, entry.select(tensors)
                )
            ]
    return problems
