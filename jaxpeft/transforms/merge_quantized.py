"""Merging an adapter into a quantized base: decoded, merged in float32, and rounded once to a dtype
or a number format.
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.quant.quantize import Quant, dequantize, quantize
from jaxpeft.transforms.merge import merge

_log = logging.getLogger(__name__)


def merge_quantized(
    method: Method,
    params: Mapping[str, Any],
    quant: Quant | str | None = None,
    dtype: Any = jnp.bfloat16,
) -> tuple[Tree, dict[str, float]]:
    """Fold an adapter into a quantized base, and return the rounding errors.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree, with quantized kernels.
        quant: how to quantize the merged base again; None for plain kernels.
        dtype: dtype of the kernels that are dequantized.

    Returns:
        `(tree without adapter leaves, errors)`: `||rounded - merged|| / ||merged||` of each
        kernel that was quantized, by the name of its module. The error of the base's original
        quantization is not included.

    Raises:
        ConfigError: No kernel is quantized, the tree has no leaves of this method, or a kernel does
            not fit the number format.
        TargetError: A target of `quant` matches nothing.
    """
    held = [site for site in targets.find_sites(params) if kernels.is_quantized(_own(params, site))]
    if not held:
        raise ConfigError("merge_quantized: no kernel of the base is quantized; use jaxpeft.merge")
    exact = merge(method, dequantize(params))
    requantized = exact if quant is None else quantize(exact, quant)
    mine = {(*site.path, "kernel") for site in held}
    result = paths.map_with_path(
        lambda path, leaf: leaf.astype(dtype) if path in mine else leaf, requantized
    )
    errors: dict[str, float] = {}
    for site in held:
        for i, name in enumerate(site.names):
            merged, rounded = (_kernel(tree, site, i) for tree in (exact, result))
            errors[name] = float(
                jnp.linalg.norm(rounded - merged) / jnp.maximum(jnp.linalg.norm(merged), 1e-30)
            )
    worst = max(errors, key=errors.__getitem__)
    _log.info(
        "merged into %s: %d kernels, median relative error %.2e, maximum %.2e (%s)",
        quant or jnp.dtype(dtype).name,
        len(errors),
        statistics.median(errors.values()),
        errors[worst],
        worst,
    )
    return result, errors


def _own(params: Mapping[str, Any], site: Site) -> dict[str, Any]:
    return {
        key: leaf
        for key, leaf in paths.get(params, site.path).items()
        if not isinstance(leaf, Mapping)
    }


def _kernel(params: Mapping[str, Any], site: Site, layer: int) -> Any:
    """Return the kernel of one layer, float32 `[in, out]`."""
    leaves = _own(params, site)
    form = kernels.FORMS[kernels.form_of(leaves) or "kernel"]
    stored = {key: leaves[key][site.index(layer)] for key in form.leaves}
    return kernels.read(stored, site.shape, site.order).astype(jnp.float32)
