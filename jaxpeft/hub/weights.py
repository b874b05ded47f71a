"""Weights from safetensors into a parameter tree, one tensor slice at a time.

Every leaf of the model's abstract tree is matched to the checkpoint's tensors by name before a byte of data is read. Each
leaf is then made by `jax.make_array_from_callback`: the callback reads just the rows that a device holds.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree
from jaxpeft.errors import WeightsError, nearest
from jaxpeft.hub.bitsandbytes import Packed, Rows
from jaxpeft.hub.safetensors_files import Tensor, aligned_empty
from jaxpeft.models.base import Family
from jaxpeft.quant.tree import Quant

_BLOCK_BYTES = 1 << 20
_STRIP = 32
_THREADS = 8
Index = tuple[slice, ...]
Tensors = Mapping[str, Tensor | Packed]


@dataclass(frozen=True)
class LeafSource:
    """Where the numbers of one leaf come from.

    Attributes:
        tensors: one, or one a layer.
        shape: of the leaf.
        dtype: of the leaf.
        stacked: whether the leading axis counts `tensors`.
        transposed: whether the leaf is the transpose of the tensors (a kernel).
    """

    tensors: tuple[Rows, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stacked: bool
    transposed: bool

    def read(self, index: Index | None) -> np.ndarray[Any, Any]:
        """Reads a slice of the leaf.

        Args:
            index: a slice for each axis of the leaf; None for all of it.

        Returns:
            Array of the slice's shape, in the leaf's dtype.
        """
        whole = (slice(None),) * len(self.shape) if index is None else index
        spans = [s.indices(n)[:2] for s, n in zip(whole, self.shape, strict=True)]
        out = aligned_empty(tuple(stop - start for start, stop in spans), self.dtype)
        blocks: list[Callable[[], None]] = []
        if not self.stacked:
            blocks += self._blocks(out, self.tensors[0], spans)
        else:
            for row, tensor in enumerate(self.tensors[slice(*spans[0])]):
                blocks += self._blocks(out[row : row + 1].reshape(out.shape[1:]), tensor, spans[1:])
        if len(blocks) == 1:
            blocks[0]()
        else:
            with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
                for _ in pool.map(lambda block: block(), blocks):
                    pass
        return out

    def _blocks(
        self, out: np.ndarray[Any, Any], tensor: Rows, spans: Sequence[tuple[int, int]]
    ) -> Iterator[Callable[[], None]]:
        """Yields functions that each read a block of the tensor's rows into its place in `out`."""
        if not spans:
            yield lambda: out.__setitem__(..., tensor.read_rows(0, 1))
            return
        rows, others = (spans[-1], spans[:-1]) if self.transposed else (spans[0], spans[1:])
        columns = (slice(None), *(slice(*span) for span in others))
        step = max(1, _BLOCK_BYTES * tensor.shape[0] // max(1, tensor.nbytes))
        for start in range(rows[0], rows[1], step):
            stop = min(start + step, rows[1])
            at = slice(start - rows[0], stop - rows[0])
            place = out[:, at].T if self.transposed else out[at]
            yield functools.partial(_copy, place, tensor, start, stop, columns)


def _copy(place: np.ndarray[Any, Any], tensor: Rows, start: int, stop: int, columns: Index) -> None:
    """Reads rows of a tensor into their place, a few at a time: a transposed copy is then six times as fast."""
    block = tensor.read_rows(start, stop)[columns]
    if block.dtype == place.dtype:
        # NumPy copies its own dtypes faster than those of ml_dtypes
        raw = f"u{block.dtype.itemsize}"
        block, place = block.view(raw), place.view(raw)
    for row in range(0, len(block), _STRIP):
        place[row : row + _STRIP] = block[row : row + _STRIP]


@dataclass(frozen=True)
class WeightPlan:
    """Which tensors make which leaf.

    Attributes:
        sources: by path, for every leaf that the checkpoint holds.
        new: the paths of the head's leaves that it does not hold, to be made newly.
        replaced: names of head tensors that the checkpoint holds for another number of labels.
        held: of each kernel that is there in few bits, by its path, the leaves that hold it, by their names.
    """

    sources: Mapping[Path, LeafSource]
    new: tuple[Path, ...]
    replaced: tuple[str, ...]
    held: Mapping[Path, Mapping[str, LeafSource]] = field(default_factory=dict[Path, Mapping[str, LeafSource]])


def plan(
    abstract: Tree,
    tensors: Tensors,
    family: Family,
    dtype: Any | None,
    folder: Any = None,
    *,
    relabel: bool = True,
) -> WeightPlan:
    """Matches a model's leaves to a checkpoint's tensors.

    Args:
        abstract: the model's tree of `ShapeDtypeStruct`.
        tensors: the checkpoint's, by name.
        family: the architecture: its prefix, and what may be left over.
        dtype: of the loaded leaves; None keeps each tensor's own, float64 apart, which becomes float32. Kernels that are
            quantised stay as they are.
        folder: what to call the checkpoint in messages.
        relabel: whether a head for another number of labels may be made newly.

    Raises:
        WeightsError: listing every missing, extra, misshaped or non-floating tensor with the nearest names, and what is wrong
            with one that is quantised.
    """
    named = _canonical_names(tensors, abstract, family)
    problems: list[str] = []
    sources: dict[Path, LeafSource] = {}
    held: dict[Path, Mapping[str, LeafSource]] = {}
    new: list[Path] = []
    replaced: list[str] = []
    used: set[str] = set()
    heads = [path for path, _ in paths.walk(abstract) if paths.is_head(path)]
    headless = not any(name in named for path in heads for name in paths.hf_names(path, None))
    for path, leaf in paths.walk(abstract):
        layers = leaf.shape[0] if paths.layer_axis(path) is not None else None
        names = paths.hf_names(path, layers)
        used.update(names)
        there = [named[name] for name in names if name in named]
        if headless and path in heads:
            new.append(path)
            continue
        problems += [f"missing: {name}{nearest(name, named)}" for name in names if name not in named]
        packed = {name: t for name in names if isinstance(t := named.get(name), Packed)}
        broken = [problem for t in packed.values() for problem in t.problems] or _unfit(path, packed, len(there))
        if broken:
            problems += broken
            continue
        wanted = _tensor_shape(path, leaf, layers)
        wrong = {name: named[name] for name in names if name in named and named[name].shape != wanted}
        if wrong and path in heads and all(t.shape[1:] == wanted[1:] for t in wrong.values()):
            if relabel:
                new.append(path)
                replaced += wrong
                continue
            problems += [_other_labels(name, t.shape[0], wanted[0]) for name, t in wrong.items()]
            continue
        problems += [f"misshaped: {name} is {list(t.shape)}, must be {list(wanted)}" for name, t in wrong.items()]
        problems += [_not_floating(name, named[name]) for name in names if _is_integer(named.get(name))]
        if packed:
            held[path] = _held(list(packed.values()), stacked=layers is not None)
        elif there:
            plain = [tensor for tensor in there if isinstance(tensor, Tensor)]
            own = _common_dtype(plain)
            target = np.dtype(dtype) if dtype is not None else own
            sources[path] = LeafSource(tuple(plain), leaf.shape, target, layers is not None, path[-1] == "kernel")
    problems += _extra(named, used, family, head_wanted=bool(heads) and not headless)
    if problems:
        where = next(iter(tensors.values())).file.parent if tensors and folder is None else folder
        raise WeightsError(_shown(problems, where))
    return WeightPlan(sources, tuple(new), tuple(replaced), held)


def _unfit(path: Path, packed: Mapping[str, Packed], there: int) -> list[str]:
    """Says where a leaf cannot be held as its tensors are."""
    if packed and path[-1] != "kernel":
        return [f"quantised: {name} is, and belongs to no linear module" for name in packed]
    if packed and len(packed) < there:
        few = f"quantised: {next(iter(packed))} is, and {there - len(packed)} of the {there} layers stacked with it are not"
        return [f"{few}; set scan_layers=False"]
    if len({frozenset((key, t.dtype) for key, t in one.leaves.items()) for one in packed.values()}) > 1:
        return [
            f"quantised: {next(iter(packed))} and the layers stacked with it have scales of different dtypes; set scan_layers=False"
        ]
    return []


def _held(packed: Sequence[Packed], *, stacked: bool) -> dict[str, LeafSource]:
    """Gives the leaves that hold a quantised kernel, or one a layer."""
    return {key: joined([one.leaves[key] for one in packed], stacked=stacked) for key in packed[0].leaves}


def joined(tensors: Sequence[Rows], *, stacked: bool) -> LeafSource:
    """Gives the leaf that tensors of one shape and dtype make as they are.

    Args:
        tensors: one, or one a layer.
        stacked: whether the leaf has an axis of layers.
    """
    first = tensors[0]
    shape = (len(tensors), *first.shape) if stacked else first.shape
    return LeafSource(tuple(tensors), shape, first.dtype, stacked, transposed=False)


def _extra(named: Tensors, used: set[str], family: Family, *, head_wanted: bool) -> list[str]:
    """Says which tensors belong to nothing. The head of another task is left out without a word; where this task's head is
    in the checkpoint, a tensor that looks like a head's may be a misspelt one of it.
    """
    extra = [n for n in named if n not in used and not any(re.fullmatch(pattern, n) for pattern in family.ignored)]
    return [
        f"extra: {name} belongs to no part of this model{nearest(name, used)}"
        for name in extra
        if head_wanted or not paths.is_head(tuple(name.split(".")))
    ]


def _other_labels(name: str, there: int, wanted: int) -> str:
    return (
        f"misshaped: {name} is for {there} labels, config.json has {wanted}; give num_labels={there} to keep the head, or "
        f"num_labels={wanted} to make it newly"
    )


def _common_dtype(tensors: Sequence[Tensor]) -> np.dtype[Any]:
    """Gives the dtype that holds every layer's numbers; float64 becomes float32."""
    kinds = {tensor.dtype for tensor in tensors}
    (kind,) = kinds if len(kinds) == 1 else (np.dtype(np.float32),)
    return np.dtype(np.float32) if kind == np.float64 else kind


def _shown(problems: list[str], folder: Any, most: int = 60) -> list[str]:
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return (
        [f"{folder}: the weights do not fit the model in config.json ({len(problems)} problems):"]
        + problems[:most]
        + more
    )


def untie(tensors: Tensors, folder: Any) -> dict[str, Tensor | Packed]:
    """Gives the tensors of a model whose head is its embedding: one of the two, under the embedding's name.

    Raises:
        WeightsError: both are there and differ.
    """
    head = next((name for name in tensors if name == "lm_head.weight"), None)
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    kept = {name: tensor for name, tensor in tensors.items() if name != head}
    if head is None:
        return kept
    if embedding is None:
        return kept | {"model.embed_tokens.weight": tensors[head]}
    if not _equal(tensors[head], tensors[embedding]):
        raise WeightsError(
            f"{folder}: config.json ties the head to the embedding, and lm_head.weight differs from {embedding}; set "
            "tie_word_embeddings to false in config.json"
        )
    return kept


def _equal(a: Tensor | Packed, b: Tensor | Packed, rows: int = 4096) -> bool:
    """Compares two tensors, a few rows at a time."""
    if isinstance(a, Packed) or isinstance(b, Packed) or a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], rows)
    return all(
        np.array_equal(a.read_rows(i, min(i + rows, a.shape[0])), b.read_rows(i, min(i + rows, a.shape[0])))
        for i in starts
    )


def _canonical_names(tensors: Tensors, abstract: Tree, family: Family) -> dict[str, Tensor | Packed]:
    """Renames the checkpoint's tensors to the names that the model's paths mirror, with or without the prefix."""
    prefix = family.prefix + "."
    has_prefix = any(name.startswith(prefix) for name in tensors)
    wants_prefix = family.prefix in abstract
    out: dict[str, Tensor | Packed] = {}
    for name, tensor in tensors.items():
        for pattern, replacement in family.renamed:
            name = re.sub(pattern, replacement, name)  # noqa: PLW2901
        if wants_prefix and not has_prefix and not paths.is_head(tuple(name.split("."))):
            name = prefix + name  # noqa: PLW2901
        elif has_prefix and not wants_prefix:
            name = name.removeprefix(prefix)  # noqa: PLW2901
        out[name] = tensor
    return out


def _tensor_shape(path: Path, leaf: Any, layers: int | None) -> tuple[int, ...]:
    shape = tuple(leaf.shape[1:] if layers is not None else leaf.shape)
    return shape[::-1] if path[-1] == "kernel" else shape


def _is_integer(tensor: Tensor | Packed | None) -> bool:
    return tensor is not None and (not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2)


def _not_floating(name: str, tensor: Tensor | Packed) -> str:
    return f"not floating: {name} is {tensor.dtype} (a quantized checkpoint?); use the unquantized model"


def read(
    abstract: Tree, weights: WeightPlan, new: Mapping[Path, Any], sharding: Any = None, quant: Quant | None = None
) -> Tree:
    """Reads every leaf, straight into device arrays; kernels that are quantised one layer after the other.

    Args:
        abstract: the model's tree, for the order of the leaves.
        weights: what `plan` gave.
        new: the newly made leaves, by path.
        sharding: a `jax.sharding.Sharding` for all leaves; None for the first device.
        quant: which kernels are quantised, and how; None for none.
    """
    place = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    chosen = {} if quant is None else quant.sites(abstract)
    items: list[tuple[Path, Any]] = []
    for path, _ in paths.walk(abstract):
        source = weights.sources.get(path)
        if path in weights.held:
            items += [((*path[:-1], key), _whole(leaf, place)) for key, leaf in weights.held[path].items()]
        elif source is None:
            items.append((path, new[path]))
        elif quant is None or path not in chosen:
            items.append((path, jax.make_array_from_callback(source.shape, place, source.read)))
        else:
            layers = [functools.partial(_layer, source, place, i) for i in range(len(source.tensors))]
            items += [((*path[:-1], key), leaf) for key, leaf in quant.stored(layers, source.stacked).items()]
    return paths.build(items)


def _whole(source: LeafSource, place: Any) -> jax.Array:
    """Reads a leaf of a quantised kernel, onto every device whole where its axes are not those that are spread."""
    try:
        place.shard_shape(source.shape)
    except (ValueError, IndexError):  # IndexError where the leaf has fewer axes
        if not isinstance(place, NamedSharding):
            raise
        place = NamedSharding(place.mesh, PartitionSpec())
    return jax.make_array_from_callback(source.shape, place, source.read)


def _layer(source: LeafSource, place: Any, i: int) -> jax.Array:
    """Reads one layer of a leaf, `[in, out]`."""
    if not source.stacked:
        return jax.make_array_from_callback(source.shape, place, source.read)
    return jax.make_array_from_callback(
        source.shape[1:], place, lambda index: source.read((slice(i, i + 1), *(index or ())))[0]
    )
