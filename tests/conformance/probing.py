"""What is found out about a method by trying it: whether several serve one batch, and whether its
base may be quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError
from jaxpeft.quant.quantize import dequantize, quantize
from tests.core.helpers import BATCH, QUICK, run


def quantized(params: Mapping[str, Any], form: str = "nf4") -> tuple[Any, Any]:
    """Return a tree whose kernels of the layers are quantized, and the same tree with the kernels
    that they stand for.
    """
    stored = quantize(params, form)
    return stored, dequantize(stored)


def on_quantized(method: Any, model: Any, base: Any, move: Any) -> str | None:
    """Try a method on a quantized base; return why it cannot, None where it computes as on the base
    that it stands for.

    `base` is that base twice, as `quantized` gives it.
    """
    stored, plain = base
    try:
        params = move(method, jaxpeft.rewrite(method, stored, jax.random.key(0)))
    except ConfigError as error:
        return str(error)
    wanted = real(run(model, move(method, jaxpeft.rewrite(method, plain, jax.random.key(0)))))
    compute = jax.jit(
        lambda p: jaxpeft.apply(model, p, BATCH.ids, BATCH.mask), compiler_options=QUICK
    )
    gap = np.abs(real(compute(params)) - wanted).max()
    if gap > 1e-4 * max(1.0, float(np.abs(wanted).max())):
        return f"the logits are off by {gap}"
    return None


def in_one_batch(method: Any, model: Any, base: Any, move: Any) -> str | None:
    """Try a bank of three, one for each row; return why it cannot, None where each row computes as
    with its own adapter.
    """
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    names = jaxpeft.adapter_names(method)  # heads and other leaves of the base are the same for all

    def of(seed: int) -> Any:
        own = move(method, fresh, seed=seed)
        return paths.map_with_path(
            lambda path, leaf: leaf if path[-1] in names else paths.get(fresh, path), own
        )

    adapters = [(method, of(seed)) for seed in range(3)]
    try:
        tree = jaxpeft.bank(adapters)
    except ConfigError as error:
        return str(error)
    compute = jax.jit(
        lambda p, which: jaxpeft.apply(model, p, BATCH.ids, BATCH.mask, adapter=which),
        compiler_options=QUICK,
    )
    rows = real(compute(tree, jnp.asarray([2, 0, 1])), flat=False)
    for row, i in enumerate((2, 0, 1)):
        alone = real(run(model, adapters[i][1]), flat=False)
        gap = np.abs(rows[row] - alone[row]).max()
        if gap > 1e-4 * max(1.0, float(np.abs(alone[row]).max())):
            return f"row {row} is off by {gap}"
    return None


def real(out: Any, flat: bool = True) -> Any:
    """Keep the logits of tokens that are no padding."""
    out = np.asarray(out)
    if out.ndim < 3:
        return out
    return (
        out[BATCH.mask.astype(bool)]
        if flat
        else np.where(BATCH.mask[..., None].astype(bool), out, 0.0)
    )
