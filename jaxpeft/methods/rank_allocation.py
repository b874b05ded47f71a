r"""AdaLoRA's rank allocation: a wrapper of the optimizer, with all of its data in its state.

It keeps, for each element w of A, e and B, with its gradient g and its new value w,

    I = |w g|,    I1 = beta1 I1 + (1 - beta1) I,    I2 = beta2 I2 + (1 - beta2) |I - I1|
        (equations 8 to 10)

and scores entry i of a site by the sum of I1 I2 of e[i] and the means of it over A[:, i] and over
B[i] (equation 11). Every `interval` steps all but the best `budget` entries of all sites are set to
zero, where, with c running from 1 to 0 (equation 12),

    budget = target + (initial - target) c^3,    initial = number of entries,
        target = target_rank sites

No entry is set to zero in the first `initial_steps`, and none is restored in the last
`final_steps`. Steps count from 1. The gradient is the optimizer's input, before clipping.

Zhang et al. 2023, section 3.2 and 3.3 (arXiv:2303.10512).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp

if TYPE_CHECKING:
    import optax

    from jaxpeft.methods.adalora import AdaLoRA


class Allocation(NamedTuple):
    """The state of the optimizer.

    Attributes:
        step: number of completed steps, int32 scalar.
        sensitivity: average of |w g| of each element of A, e and B.
        uncertainty: average of the deviation from the sensitivity.
        kept: bool, the entries of e kept by the last allocation.
        inner: state of the wrapped optimizer.
    """

    step: Any
    sensitivity: Tree
    uncertainty: Tree
    kept: Tree
    inner: Any


def allocate_ranks(
    method: AdaLoRA, inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """Wrap an optimizer so that it allocates the ranks.

    Args:
        method: the method, with the schedule.
        inner: the optimizer of the trained part of the tree.
        steps: number of steps of the run.

    Raises:
        ConfigError: The run is too short for `initial_steps` and `final_steps`.
    """
    import optax

    end = steps - method.final_steps
    if method.initial_steps >= end:
        raise ConfigError(
            f"method.initial_steps: {method.initial_steps} steps at the start and"
            f" {method.final_steps} at the end (final_steps) leave none of the run's {steps} steps"
            " to allocate ranks in"
        )

    def init(params: Any) -> Allocation:
        own = [
            (path, leaf) for path, leaf in paths.walk(params) if path[-1] in method.leaves.trained
        ]
        first, second = (
            paths.build([(path, jnp.zeros_like(leaf)) for path, leaf in own]) for _ in range(2)
        )
        kept = paths.build(
            [(path, jnp.ones_like(leaf, bool)) for path, leaf in own if path[-1] == "adalora_e"]
        )
        return Allocation(jnp.zeros((), jnp.int32), first, second, kept, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Allocation]:
        given, old, step = dict(paths.walk(updates)), dict(paths.walk(params)), state.step + 1
        made, below = inner.update(updates, state.inner, params)
        moves = dict(paths.walk(cast(Tree, made)))

        def average(decay: float, before: Any, now: Any) -> Any:
            return jnp.where(step < end, decay * before + (1 - decay) * now, before)

        size = {
            path: jnp.abs((old[path] + moves[path]) * given[path])
            for path, _ in paths.walk(state.sensitivity)
        }
        first = paths.map_with_path(
            lambda path, leaf: average(method.beta1, leaf, size[path]), state.sensitivity
        )
        gap = {path: jnp.abs(size[path] - leaf) for path, leaf in paths.walk(first)}
        second = paths.map_with_path(
            lambda path, leaf: average(method.beta2, leaf, gap[path]), state.uncertainty
        )

        there = {
            path: entries(old[(*path[:-1], "adalora_a")]) for path, _ in paths.walk(state.kept)
        }
        due = (step > method.initial_steps) & (step < end) & (step % method.interval == 0) | (
            step == end
        )
        best = _best(first, second, there, _entries_to_zero(method, step, end, there))
        kept = paths.map_with_path(
            lambda path, before: jnp.where(due, best[path], before), state.kept
        )
        for path, keep in paths.walk(kept):
            moves[path] = jnp.where(keep | ~(due | (step > end)), moves[path], -old[path])
        return paths.build(list(moves.items())), Allocation(step, first, second, kept, below)

    return optax.GradientTransformation(init, update)


def entries(a: Any) -> Any:
    """Return which entries are not padding, `[..., in, r]` to `[..., r]`: their column of A is
    nonzero.
    """
    return jnp.any(a != 0, axis=-2)


def _entries_to_zero(method: AdaLoRA, step: Any, end: int, there: Mapping[Path, Any]) -> Any:
    """Return the number of entries to set to zero at a step, int32; may be negative."""
    initial, sites = jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32)
    for flags in there.values():
        initial += jnp.sum(flags.astype(jnp.int32))
        sites += jnp.sum(flags.any(-1).astype(jnp.int32))
    target = method.target_rank * sites
    share = (end - step).astype(jnp.float32) / (end - method.initial_steps)
    above = (initial - target).astype(jnp.float32)
    return initial - target - jnp.floor(above * share**3).astype(jnp.int32)


def _best(first: Tree, second: Tree, there: Mapping[Path, Any], cut: Any) -> dict[Path, Any]:
    """Return which entries of each e are kept: all except the `cut` worst of all sites and ties."""
    scores: dict[Path, Any] = {}
    for path, flags in there.items():
        a, e, b = (
            paths.get(first, (*path[:-1], name)) * paths.get(second, (*path[:-1], name))
            for name in ("adalora_a", "adalora_e", "adalora_b")
        )
        scores[path] = jnp.where(flags, e + jnp.mean(a, -2) + jnp.mean(b, -1), jnp.inf)
    ordered = jnp.sort(jnp.concatenate([score.reshape(-1) for score in scores.values()]))
    bar = jnp.where(cut > 0, ordered[jnp.maximum(cut - 1, 0)], -jnp.inf)
    return {path: score > bar for path, score in scores.items()}
