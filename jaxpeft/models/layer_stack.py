"""Running a stack of layers: all in one scan, in several, or one after the other.

Equal layers are one scan, whose body is one layer. Unequal layers are split into runs that repeat a
pattern, `d d (a a b)(a a b)(a a b) a`: the body of a run's scan is its pattern, and the leaves of
the layers at one place of the pattern are stacked. What repeats nothing is a layer of its own. A
compiler then sees each layer of a pattern once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, cast

import flax.linen as nn
import jax

from jaxpeft.core import paths
from jaxpeft.core.paths import Path
from jaxpeft.models.base import PAST, ROUTING, ModelOptions
from jaxpeft.remat import REMAT_POLICIES, RematPolicy
from jaxpeft.sharding.logical_axes import mesh_of

Array = jax.Array
_LONGEST = 64
"""The longest pattern that is searched for, which bounds the time of the search."""


def find_runs(kinds: Sequence[Hashable]) -> tuple[range, ...]:
    """Split layers into runs, so that the patterns of all runs have the fewest layers in total.

    Of equally good splits, the first runs are the longest.

    Args:
        kinds: what distinguishes each layer; equal for layers that can be stacked.

    Returns:
        `range(start, stop, step)` for each run, in order: layers `start` to below `stop` repeat a
        pattern of `step` layers.
    """
    count = len(kinds)
    numbers: dict[Hashable, int] = {}
    ids = [numbers.setdefault(kind, len(numbers)) for kind in kinds]
    matching = [0] * (_LONGEST + 1)  # by step: how many layers from here on equal those a step on
    best: list[tuple[int, int, range]] = [(0, 0, range(0))] * (count + 1)
    for start in range(count - 1, -1, -1):
        found = [range(start, start + 1)]
        for step in range(1, min(_LONGEST, count - start - 1) + 1):
            equal = ids[start] == ids[start + step]
            matching[step] = matching[step] + 1 if equal else 0
            times = matching[step] // step + 1
            # one repetition less may leave the next run a longer pattern
            found += [range(start, start + n * step, step) for n in (times, times - 1) if n > 1]
        totals = ((best[run.stop][0] + run.step, best[run.stop][1] + 1, run) for run in found)
        best[start] = min(totals, key=lambda total: (*total[:2], -total[2].stop))
    return tuple(_chain(best))


def _chain(best: Sequence[tuple[int, int, range]]) -> Iterator[range]:
    start = 0
    while start < len(best) - 1:
        yield best[start][2]
        start = best[start][2].stop


def run_layers(
    block: type[nn.Module],
    fields: Sequence[Mapping[str, Any]],
    name: str,
    options: ModelOptions,
    x: Any,
    per_layer: Any,
    *shared: Any,
    kinds: Sequence[Hashable] = (),
) -> Any:
    """Run a stack of layers in the scope of the calling module.

    Args:
        block: a module class; called with `(x, per_layer, *shared)`, it returns `(x, None)`.
        fields: the fields of each layer's module.
        name: name of the stack in the tree, `layers` or `layer`.
        options: options of the model, with `scan_layers` and `remat`.
        x: the first layer's input, a pytree whose structure is that of a layer's output.
        per_layer: a pytree of what the layers do not share: arrays with a leading layer axis, lists
            with an entry for each layer, and dicts with an entry for each name of layers
            (`paths.layers_name`). The entries of a list are equal for layers of one kind.
        *shared: inputs that the layers share.
        kinds: what distinguishes each layer, in its fields and its entries of lists; empty if
            layers are equal.

    Returns:
        The last layer's `x`.
    """
    layers = range(len(fields))
    runs = _runs(len(fields), kinds, options)
    if options.scan_layers and runs == (layers,):
        wrapped = _wrap(block, options, paths.ALL_LAYERS, scanned=True)
        scanned = _scan(wrapped, len(layers), _axes(per_layer), shared)
        return scanned(**fields[0], name=name)(x, _own(per_layer, paths.ALL_LAYERS), *shared)[0]
    return _Runs(block, tuple(map(dict, fields)), options, runs, name=name)(x, per_layer, *shared)


def _runs(count: int, kinds: Sequence[Hashable], options: ModelOptions) -> tuple[range, ...]:
    """Return the runs of a stack, see `find_runs`; single layers if they are unrolled."""
    if not options.scan_layers:
        return tuple(range(i, i + 1) for i in range(count))
    return find_runs(kinds) if kinds else (range(count),)


def _places(run: range) -> list[range]:
    """Return the layers at each place of a run's pattern."""
    return [range(start, run.stop, run.step) for start in range(run.start, run[0] + run.step)]


def stacked_layers(
    count: int, kinds: Sequence[Hashable], options: ModelOptions
) -> dict[str, range]:
    """Return the layers that are stacked, by their name in paths.

    Args:
        count: number of layers.
        kinds: see `run_layers`.
        options: options of the model.
    """
    runs = _runs(count, kinds, options)
    if options.scan_layers and runs == (range(count),):
        return {paths.ALL_LAYERS: range(count)}
    return {paths.layers_name(layers): layers for run in runs for layers in _places(run)}


class _Runs(nn.Module):
    """The runs of a stack of layers; a run of one layer is not a scan."""

    block: type[nn.Module]
    fields: tuple[Mapping[str, Any], ...]
    options: ModelOptions
    runs: tuple[range, ...]

    @nn.compact
    def __call__(self, x: Array, per_layer: Any, *shared: Any) -> Array:
        axes = _axes(per_layer)
        for run in self.runs:
            names = [paths.layers_name(layers) for layers in _places(run)]
            own = tuple(_own(per_layer, name) for name in names)
            scanned = len(run) > 1
            blocks = tuple(
                _wrap(self.block, self.options, name, scanned=scanned)(**self.fields[i], name=name)
                for i, name in enumerate(names, run.start)
            )
            if not scanned:
                x, _ = blocks[0](x, *own, *shared)
                continue
            pattern = _scan(_Pattern, len(run), (axes,) * len(blocks), shared)
            x, _ = pattern(blocks)(x, own, *shared)
        return x


class _Pattern(nn.Module):
    """The layers of a run's pattern, one after the other.

    They are modules of the enclosing stack, so that their leaves have no names of their own.
    """

    blocks: tuple[nn.Module, ...]

    def __call__(self, x: Array, own: tuple[Any, ...], *shared: Any) -> tuple[Array, None]:
        for block, each in zip(self.blocks, own, strict=True):
            x, _ = cast(Any, block)(x, each, *shared)
        return x, None


def _scan(module: Any, length: int, axes: Any, shared: Sequence[Any]) -> Any:
    """Return a module class that runs a module `length` times, on stacked leaves.

    Args:
        module: a module class; called with `(x, per_layer, *shared)`, it returns `(x, None)`.
        length: number of layers in a stack.
        axes: the axes of `per_layer` along which it is scanned.
        shared: inputs that the layers share.
    """
    inputs: Any = (axes, *(nn.broadcast for _ in shared))
    return nn.scan(
        module,
        variable_axes={"params": 0, PAST: 0, ROUTING: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=inputs,
        length=length,
    )


def _own(per_layer: Any, name: str) -> Any:
    """Return what layers with a name get of `per_layer`, see `run_layers`."""
    layers = paths.named_layers(name)

    def own(entry: Any) -> Any:
        if isinstance(entry, dict):
            return cast(dict[str, Any], entry).get(name)
        if isinstance(entry, list):
            return cast(list[Any], entry)[layers.start if layers else 0]
        if layers is None:
            return entry
        one = len(layers) == 1
        return entry[layers.start] if one else entry[layers.start : layers.stop : layers.step]

    return jax.tree.map(own, per_layer, is_leaf=_is_entry)


def _axes(per_layer: Any) -> Any:
    """Return the axes of `per_layer` along which layers are scanned."""
    return jax.tree.map(
        lambda entry: nn.broadcast if isinstance(entry, list) else 0, per_layer, is_leaf=_is_entry
    )


def _is_entry(node: Any) -> bool:
    return isinstance(node, (list, dict))


def _wrap(block: type[nn.Module], options: ModelOptions, layers: str, *, scanned: bool) -> Any:
    """Wrap a block as the options ask: its parameters are fetched, and the backward pass
    recomputes.
    """
    if options.offload or options.gathered:
        block = _fetch_parameters(block, options, layers)
    return _remat(block, options, scanned=scanned)


def _remat(block: type[nn.Module], options: ModelOptions, *, scanned: bool) -> Any:
    """Wrap a block so that the backward pass recomputes what the policy does not save."""
    if options.remat == "none":
        return block
    policy = _saveable(REMAT_POLICIES[options.remat])
    # the passes of a scan are two loops, so that the compiler cannot merge them
    return nn.remat(block, policy=policy, prevent_cse=not scanned)


def _fetch_parameters(block: type[nn.Module], options: ModelOptions, layers: str) -> Any:
    """Wrap a block so that it first moves its parameters to the device or gathers them.

    This happens inside of remat, so that the backward pass moves them again instead of saving them.
    """
    given = dict(options.gathered)
    gathered = given | {path[1:]: spec for path, spec in given.items() if path[0] == layers}

    def fetch(path: Path, leaf: Any) -> Any:
        if options.offload:
            leaf = jax.device_put(leaf, jax.memory.Space.Device)
        if path in gathered and mesh_of() is not None:
            leaf = jax.lax.with_sharding_constraint(leaf, gathered[path])
        return leaf

    def fetch_all(variables: Any) -> Any:
        return {kind: paths.map_with_path(fetch, leaves) for kind, leaves in variables.items()}

    return nn.map_variables(block, "params", trans_in_fn=fetch_all, init=True, mutable=True)


def _saveable(policy: RematPolicy) -> Any:
    """Return the `jax.checkpoint` policy; None if nothing is saved."""
    if policy.offloaded:
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*policy.kept],
            names_which_can_be_offloaded=[*policy.offloaded],
            offload_src="device",
            offload_dst="pinned_host",
        )
    return _saves(*policy.kept) if policy.kept else None


def _saves(*names: str) -> Callable[..., bool]:
    """Return a policy that saves these names, and the residuals of flash attention."""
    by_name = jax.checkpoint_policies.save_only_these_names(*names)
    # its softmax statistics have no name: without them attention would be recomputed
    return lambda primitive, *args, **how: (
        primitive.name.startswith("dot_product_attention_fwd") or by_name(primitive, *args, **how)
    )
