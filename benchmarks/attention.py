"""Time and error of each attention kernel of the device, forward, and forward with gradients, by
kind of mask.

    python -m benchmarks.attention [--batch 4] [--length 2048] [--heads 32] [--kv-heads 8] [--head-dim 128]

Prints a JSON line for each: milliseconds per call, the median of 20, from the difference of loops
of two lengths in one program; and the error of its values and gradients, compared with `xla` in
float32, `||found - exact|| / ||exact||`. `causal` is the mask of a decoder, `packed` has four
documents per row, `window` sees 512 positions back, `padded` is an encoder's text in three quarters
of the row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.looping import milliseconds
from jaxpeft.models import attention
from jaxpeft.models.masks import Mask, make_mask


class Layer(nn.Module):
    """The attention of a layer, after its projections."""

    kernel: str

    @nn.compact
    def __call__(self, q: Any, k: Any, v: Any, mask: Mask) -> Any:
        """Attend: `[batch, length, heads, head_dim]` to `[batch, length, heads * head_dim]`."""
        return attention.attend(self, self.kernel, q, k, v, mask, 0.0)


def masks(batch: int, length: int) -> Mapping[str, Callable[[str], Mask]]:
    """Return functions that prepare each mask for a kernel, by name."""
    segments = jnp.broadcast_to(
        jnp.arange(length, dtype=jnp.int32) * 4 // length + 1, (batch, length)
    )
    text = jnp.broadcast_to(
        (jnp.arange(length) < length * 3 // 4).astype(jnp.int32), (batch, length)
    )
    made = {
        "causal": lambda: make_mask(None, None, causal=True),
        "packed": lambda: make_mask(None, segments, causal=True),
        "window": lambda: make_mask(None, None, causal=True, window=512),
        "padded": lambda: make_mask(text, None, causal=False),
    }
    return {
        name: lambda kernel, mask=mask: mask().prepare(kernel, length)
        for name, mask in made.items()
    }


def main(argv: list[str]) -> None:
    """Measure every kernel of the device with every mask."""
    parser = argparse.ArgumentParser(prog="benchmarks.attention")
    for name, usual in (
        ("batch", 4),
        ("length", 2048),
        ("heads", 32),
        ("kv-heads", 8),
        ("head-dim", 128),
    ):
        parser.add_argument(f"--{name}", type=int, default=usual)
    parser.add_argument("--loops", type=int, nargs=2, default=(5, 25))
    o = parser.parse_args(argv)
    here = attention.platform(jax.devices()[0])
    shapes = ((o.batch, o.length, heads, o.head_dim) for heads in (o.heads, o.kv_heads, o.kv_heads))
    q, k, v = (
        jax.random.normal(jax.random.key(i), s, jnp.float32).astype(jnp.bfloat16)
        for i, s in enumerate(shapes)
    )
    for name, mask in masks(o.batch, o.length).items():
        wide = [array.astype(jnp.float32) for array in (q, k, v)]
        exact = jax.block_until_ready(jax.jit(_with_gradients("xla", mask("xla")))(*wide))
        for kernel in (
            kernel for kernel, of in attention.KERNELS.items() if of.platform in ("", here)
        ):
            alone, both = _alone(kernel, mask(kernel)), _with_gradients(kernel, mask(kernel))
            found = jax.jit(both)(q, k, v)
            line = {
                "kernel": kernel,
                "mask": name,
                "batch": o.batch,
                "length": o.length,
                "heads": o.heads,
                "kv_heads": o.kv_heads,
                "head_dim": o.head_dim,
                "forward_ms": taken(alone, (q, k, v), o.loops),
                "both_ms": taken(_next(both), (q, k, v), o.loops),
                "error_values": _error(found[:1], exact[:1]),
                "error_gradients": _error(found[1:], exact[1:]),
                "device": jax.devices()[0].device_kind,
                "jax": jax.__version__,
            }
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def taken(run: Callable[..., Any], arrays: tuple[Any, Any, Any], loops: tuple[int, int]) -> float:
    """Return the milliseconds of one call of `run`, whose results are the arguments of the next."""
    return milliseconds(lambda arrays, _: run(*arrays), arrays, None, loops)


def _attend(kernel: str, mask: Mask, q: Any, k: Any, v: Any) -> Any:
    return Layer(kernel).apply({}, q, k, v, mask)


def _alone(kernel: str, mask: Mask) -> Callable[..., tuple[Any, Any, Any]]:
    return lambda q, k, v: (_attend(kernel, mask, q, k, v).reshape(q.shape), k, v)


def _next(both: Callable[..., tuple[Any, ...]]) -> Callable[..., Any]:
    return lambda *arrays: both(*arrays)[1:]


def _with_gradients(kernel: str, mask: Mask) -> Callable[..., tuple[Any, ...]]:
    def both(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
        out, back = jax.vjp(lambda q, k, v: _attend(kernel, mask, q, k, v), q, k, v)
        return (out, *back(out))

    return both


def _error(found: Any, exact: Any) -> float:
    off = sum(
        jnp.sum(jnp.square(a.astype(jnp.float32) - b)) for a, b in zip(found, exact, strict=True)
    )
    return round(float(jnp.sqrt(off / sum(jnp.sum(jnp.square(b)) for b in exact))), 5)


if __name__ == "__main__":
    main(sys.argv[1:])
