"""What is found out about a method by trying it: whether several serve one batch, and whether its base may be quantised."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import forward
from jaxpeft.core import kernels, paths
from jaxpeft.core.method import Call, Method
from jaxpeft.errors import ConfigError
from tests.core.helpers import BATCH, QUICK, run


@dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """A kernel in 8 bits, one scale a column, as a format of a quantised base would have it."""

    name: ClassVar[str] = "int8"
    leaf_names: ClassVar[tuple[str, ...]] = ("kernel_int8", "kernel_scale")

    @staticmethod
    def compute(call: Call) -> Any:
        y = call.x @ call.kernel().astype(call.x.dtype)
        return y if call.bias is None else y + call.bias.astype(y.dtype)


@contextmanager
def int8_known() -> Generator[None]:
    """Lets the library know the format."""
    before = kernels.FORMS, forward.MARKERS
    form = kernels.Form(lambda leaves: leaves["kernel_int8"].astype(jnp.float32) * leaves["kernel_scale"])
    kernels.FORMS = {**before[0], "kernel_int8": form}  # type: ignore[misc]
    forward.MARKERS = {"kernel_int8": Int8, **before[1]}  # type: ignore[misc]
    try:
        yield
    finally:
        kernels.FORMS, forward.MARKERS = before  # type: ignore[misc]


def quantised(params: Mapping[str, Any]) -> tuple[Any, Any]:
    """Gives a tree whose kernels of the layers are in 8 bits, and the same tree with the kernels that they stand for."""
    stored, plain = [], []
    for path, leaf in paths.walk(params):
        if path[-1] != "kernel" or paths.is_head(path) or path[0] == "lm_head":
            stored.append((path, leaf))
            plain.append((path, leaf))
            continue
        scale = jnp.maximum(jnp.abs(leaf).max(axis=-2, keepdims=True), 1e-9) / 127
        codes = jnp.round(leaf / scale).astype(jnp.int8)
        stored += [((*path[:-1], "kernel_int8"), codes), ((*path[:-1], "kernel_scale"), scale)]
        plain.append((path, codes.astype(jnp.float32) * scale))
    return paths.build(stored), paths.build(plain)


def on_quantised(method: Any, model: Any, base: Any, move: Any) -> str | None:
    """Tries a method on a quantised base; gives why it cannot, None where it computes as on the base that it stands for."""
    with int8_known():
        stored, plain = quantised(base)
        try:
            params = move(method, jaxpeft.rewrite(method, stored, jax.random.key(0)))
        except ConfigError as error:
            return str(error)
        wanted = real(run(model, move(method, jaxpeft.rewrite(method, plain, jax.random.key(0)))))
        compute = jax.jit(lambda p: jaxpeft.apply(model, p, BATCH.ids, BATCH.mask), compiler_options=QUICK)
        gap = np.abs(real(compute(params)) - wanted).max()
        if gap > 1e-4 * max(1.0, float(np.abs(wanted).max())):
            return f"the logits are off by {gap}"
    return None


def in_one_batch(method: Any, model: Any, base: Any, move: Any) -> str | None:
    """Tries a bank of three, one for each row; gives why it cannot, None where each row computes as with its own adapter."""
    fresh = jaxpeft.rewrite(method, base, jax.random.key(0))
    names = jaxpeft.adapter_names(method)  # heads and other leaves of the base are the same for all

    def of(seed: int) -> Any:
        own = move(method, fresh, seed=seed)
        return paths.map_with_path(lambda path, leaf: leaf if path[-1] in names else paths.get(fresh, path), own)

    adapters = [(method, of(seed)) for seed in range(3)]
    try:
        tree = jaxpeft.bank(adapters)
    except ConfigError as error:
        return str(error)
    compute = jax.jit(
        lambda p, which: jaxpeft.apply(model, p, BATCH.ids, BATCH.mask, adapter=which), compiler_options=QUICK
    )
    rows = real(compute(tree, jnp.asarray([2, 0, 1])), flat=False)
    for row, i in enumerate((2, 0, 1)):
        alone = real(run(model, adapters[i][1]), flat=False)
        gap = np.abs(rows[row] - alone[row]).max()
        if gap > 1e-4 * max(1.0, float(np.abs(alone[row]).max())):
            return f"row {row} is off by {gap}"
    return None


def real(out: Any, flat: bool = True) -> Any:
    """Keeps the logits of tokens that are no padding."""
    out = np.asarray(out)
    if out.ndim < 3:
        return out
    return out[BATCH.mask.astype(bool)] if flat else np.where(BATCH.mask[..., None].astype(bool), out, 0.0)
