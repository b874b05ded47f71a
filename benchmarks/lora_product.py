"""Three ways to compute `x (W + A B)` for linear sites with the same input, forward and backward,
by shape and number format.

    python -m benchmarks.lora_product [--shape llama3_8b] [--rows 8192] [--quant none nf4] [--rank 16]

Prints a JSON line for each: `apart` differentiates `x W + (x A) B` site by site; `joint` is
`jaxpeft.kernels.joint`, as in a run; `merged` computes `W + A B` in bfloat16 in each of the two
passes, with a custom VJP that saves neither, so that the update causes no reads or writes of
activations. `ms` is one call, forward and backward with the gradients of the input and of all
factors, the median of 20, from the difference of loops of two lengths in one program.
`update_error` is `||found - exact|| / ||exact||` of the update's contribution to the outputs, for
factors whose product is a thousandth of the kernel: the loss from rounding `W + A B` to bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.looping import milliseconds
from benchmarks.step import SHAPES
from jaxpeft import kernels
from jaxpeft.kernels import QUANTIZED, joint
from jaxpeft.kernels.form import Quantized, over_rows

Leaves = Mapping[str, Any]
Ways = Callable[[Any, list[joint.LinearSite]], tuple[Any, ...]]


def apart(x: Any, sites: list[joint.LinearSite]) -> tuple[Any, ...]:
    """Compute the sites one by one, differentiated as written."""
    out: list[Any] = []
    for site in sites:
        a, b = site.factors or (None, None)
        form = kernels.form_of(site.stored) or "kernel"
        held = kernels.FORMS[form]
        own = (
            held.matmul(x, site.stored)
            if isinstance(held, Quantized)
            else held.forward(x, site.stored)
        )
        out.append(
            own + (x @ a.astype(x.dtype)) @ b.astype(x.dtype)
            if a is not None and b is not None
            else own
        )
    return tuple(out)


def merged(x: Any, sites: list[joint.LinearSite]) -> tuple[Any, ...]:
    """Compute the sites with merged kernels, computed again for each product."""
    return tuple(_merged(site.stored, *(site.factors or ()))(x) for site in sites)


def _merged(stored: Leaves, a: Any, b: Any) -> Callable[[Any], Any]:
    def whole(stored: Leaves, a: Any, b: Any, x: Any) -> Any:
        stored, a, b, _ = jax.lax.optimization_barrier((dict(stored), a, b, x))
        kernel = kernels.read(stored, (a.shape[0], b.shape[1])).astype(jnp.float32)
        # written out as a sum of outer products: XLA fuses it with the decoding, where a product
        # would be an array of its own
        return (kernel + sum(a[:, i, None] * b[i, None, :] for i in range(a.shape[1]))).astype(
            x.dtype
        )

    def forward(x: Any, stored: Leaves, a: Any, b: Any) -> tuple[Any, Any]:
        return x @ whole(stored, a, b, x), (x, stored, a, b)

    def backward(saved: Any, dy: Any) -> Any:
        x, stored, a, b = saved
        dx = dy @ whole(stored, a, b, dy).T
        dh, h = dy @ b.astype(dy.dtype).T, x @ a.astype(x.dtype)
        return dx, None, over_rows(x, dh, a.dtype), over_rows(h, dy, b.dtype)

    run = jax.custom_vjp(lambda x, stored, a, b: forward(x, stored, a, b)[0])
    run.defvjp(forward, backward)
    return lambda x: run(x, dict(stored), a, b)


WAYS: Mapping[str, Ways] = {"apart": apart, "joint": joint.products, "merged": merged}


def groups(shape: str) -> dict[str, tuple[int, list[int]]]:
    """Return the groups of sites of one layer with the same input: the inputs, and the outputs of
    each site.
    """
    of = SHAPES[shape]
    d, wide = of["hidden_size"], of["intermediate_size"]
    kv = d // of["num_attention_heads"] * of["num_key_value_heads"]
    return {
        "q, k, v": (d, [d, kv, kv]),
        "o": (d, [d]),
        "gate, up": (d, [wide, wide]),
        "down": (wide, [d]),
    }


def main(argv: list[str]) -> None:
    """Measure every group of sites in every format and variant."""
    parser = argparse.ArgumentParser(prog="benchmarks.lora_product")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama3_8b")
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quant", nargs="+", default=["none", "nf4"])
    parser.add_argument("--loops", type=int, nargs=2, default=(4, 24))
    options = parser.parse_args(argv)
    for form in options.quant:
        for name, (n_in, outs) in groups(options.shape).items():
            for way, run in WAYS.items():
                sites = [_site(i, n_in, n_out, options.rank, form) for i, n_out in enumerate(outs)]
                line = {
                    "shape": options.shape,
                    "rows": options.rows,
                    "rank": options.rank,
                    "quant": form,
                    "sites": name,
                    "way": way,
                    "ms": timed(run, sites, n_in, options.rows, options.loops),
                    "update_error": round(update_error(run, sites, n_in), 4),
                    "device": jax.devices()[0].device_kind,
                    "jax": jax.__version__,
                }
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


def _site(i: int, n_in: int, n_out: int, rank: int, form: str) -> joint.LinearSite:
    """Make a site: a kernel like those of a model, and an update of a thousandth of it."""
    keys = jax.random.split(jax.random.key(i), 3)
    kernel = (0.02 * jax.random.normal(keys[0], (n_in, n_out))).astype(jnp.bfloat16)
    stored = {"kernel": kernel} if form == "none" else jax.jit(QUANTIZED[form].store)(kernel)
    a, b = jax.random.normal(keys[1], (n_in, rank)), jax.random.normal(keys[2], (rank, n_out))
    size = (2e-5 / rank**0.5) ** 0.5
    return joint.LinearSite(stored, (size * a, size * b))


def timed(
    run: Ways, sites: list[joint.LinearSite], n_in: int, rows: int, loops: tuple[int, int]
) -> float:
    """Return the milliseconds of one call and its gradients."""
    x = jax.random.normal(jax.random.key(9), (1, rows, n_in)).astype(jnp.bfloat16)
    factors = [site.factors for site in sites]
    stored = [dict(site.stored) for site in sites]

    def once(x: Any, stored: Any, factors: Any) -> Any:
        held = [joint.LinearSite(leaves, own) for leaves, own in zip(stored, factors, strict=True)]
        out, back = jax.vjp(
            lambda x, own: run(
                x, [dataclasses.replace(s, factors=f) for s, f in zip(held, own, strict=True)]
            ),
            x,
            factors,
        )
        dx, dfactors = back(out)
        # everything feeds the next round, so that nothing is left out
        return dx * jnp.asarray(1e-2, dx.dtype), jax.tree.map(
            lambda leaf, grad: leaf + 1e-9 * grad, factors, dfactors
        )

    return milliseconds(
        lambda carry, stored: once(carry[0], stored, carry[1]), (x, factors), stored, loops
    )


def update_error(run: Ways, sites: list[joint.LinearSite], n_in: int, rows: int = 256) -> float:
    """Return the relative error of the updates' contribution to the outputs."""
    x = jax.random.normal(jax.random.key(9), (1, rows, n_in)).astype(jnp.bfloat16)
    none = [
        dataclasses.replace(site, factors=(jnp.zeros_like(site.factors[0]), site.factors[1]))
        for site in sites
        if site.factors
    ]
    exact = [
        x.astype(jnp.float32) @ site.factors[0] @ site.factors[1] for site in sites if site.factors
    ]
    # in float32 the rounding of the outputs does not hide the update's
    wide = x.astype(jnp.float32)

    def out(sites: list[joint.LinearSite]) -> list[Any]:
        if run is merged:
            return [wide @ _held(site, x.dtype) for site in sites]
        return list(run(wide, [dataclasses.replace(s, stored=_wide(s)) for s in sites]))

    found = [after - before for after, before in zip(out(sites), out(none), strict=True)]
    off = sum(jnp.sum(jnp.square(a - b)) for a, b in zip(found, exact, strict=True))
    return float(jnp.sqrt(off / sum(jnp.sum(jnp.square(b)) for b in exact)))


def _wide(site: joint.LinearSite) -> Leaves:
    a, b = site.factors or (None, None)
    if a is None or b is None:
        return site.stored
    return {"kernel": kernels.read(site.stored, (a.shape[0], b.shape[1])).astype(jnp.float32)}


def _held(site: joint.LinearSite, dtype: Any) -> Any:
    """Return the merged kernel, rounded."""
    a, b = site.factors or (None, None)
    return (_wide(site)["kernel"] + a @ b).astype(dtype).astype(jnp.float32)


if __name__ == "__main__":
    main(sys.argv[1:])
