"""How long a small part of a step takes on a device, where calling it takes longer than computing
it.
"""

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
    """Return the milliseconds of one round, as the difference of two programs that loop: calling
    them is in both.

    Args:
        once: computes a round, `(carry, held) -> carry`; what it leaves out of its result may not
            be computed at all.
        carry: arrays of the first round.
        held: arrays that are the same in all rounds.
        loops: rounds of the two programs, the fewer first.
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
