"""Time of a small operation on a device, whose call takes longer than its computation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxpeft.train import compiling


def milliseconds(
    once: Callable[[Any, Any], Any], carry: Any, held: Any, loops: tuple[int, int]
) -> float:
    """Return the milliseconds of one round, from the difference of two programs that loop, both of
    which include the overhead of a call.

    Args:
        once: computes a round, `(carry, held) -> carry`; the compiler may remove computations that do
            not affect its result.
        carry: arrays of the first round.
        held: arrays that are the same in all rounds.
        loops: rounds of the two programs, the smaller first.
    """

    def program(count: int) -> Callable[[], Any]:
        def many(carry: Any, held: Any) -> Any:
            return jax.lax.fori_loop(0, count, lambda _, carry: once(carry, held), carry)

        compiled = (
            jax.jit(many)
            .lower(carry, held)
            .compile(compiler_options=compiling.options(jax.devices()[0]))
        )
        jax.block_until_ready(compiled(carry, held))
        return lambda: jax.block_until_ready(compiled(carry, held))

    short, long = (program(count) for count in loops)
    taken: list[float] = []
    for _ in range(20):
        start = time.perf_counter()
        short()
        middle = time.perf_counter()
        long()
        taken.append((time.perf_counter() - middle - (middle - start)) / (loops[1] - loops[0]))
    return round(1e3 * statistics.median(taken), 4)
