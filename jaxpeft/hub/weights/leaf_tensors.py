"""Matching a checkpoint's tensors to a model's leaves by name, and checking them, without reading
their data.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.tree import FIXED
from jaxpeft.errors import WeightsError, nearest
from jaxpeft.hub.weights.bitsandbytes import Packed
from jaxpeft.hub.weights.leaf_sources import ExtendedTensor, LeafSource, UprightTensor, join
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.models.base import Family

AnyTensor = Tensor | UprightTensor | Packed
Tensors = Mapping[str, AnyTensor]
_LAYER = re.compile(r"(?:^|\.)layers?\.(\d{1,9})\.")
_EXPERT = re.compile(r"\.experts\.(\d{1,9})\.")


@dataclass(frozen=True)
class WeightPlan:
    """The source tensors of each leaf.

    Attributes:
        sources: source of each leaf in the checkpoint, by path.
        new: paths of the head's leaves that are missing and will be initialized.
        replaced: names of head tensors in the checkpoint with a different number of labels.
        held: for each kernel quantized in the checkpoint, by path, its leaves by name.
        form: the format of these kernels, a key of `jaxpeft.kernels.QUANTIZED`; None without any.
    """

    sources: Mapping[Path, LeafSource]
    new: tuple[Path, ...]
    replaced: tuple[str, ...]
    held: Mapping[Path, Mapping[str, LeafSource]] = field(
        default_factory=dict[Path, Mapping[str, LeafSource]]
    )
    form: str | None = None

    def grow(self, abstract: Tree) -> WeightPlan:
        """Return the plan with rows for added tokens, initialized to the mean of the existing ones.

        Args:
            abstract: the model's tree with the added rows.
        """
        sources = dict(self.sources)
        for path, leaf in paths.walk(abstract):
            source = sources.get(path)
            if source is not None and source.shape != leaf.shape:
                rows = leaf.shape[-1] if source.transposed else leaf.shape[0]
                tables = tuple(
                    ExtendedTensor(table, rows, source.dtype) for table in source.tensors
                )
                sources[path] = dataclasses.replace(source, tensors=tables, shape=leaf.shape)
        return dataclasses.replace(self, sources=sources)


def plan(
    abstract: Tree,
    tensors: Tensors,
    family: Family,
    dtype: Any | None,
    folder: Any = None,
    *,
    relabel: bool = True,
) -> WeightPlan:
    """Match a model's leaves to a checkpoint's tensors.

    Args:
        abstract: the model's tree of `ShapeDtypeStruct`.
        tensors: the checkpoint's tensors by name.
        family: the architecture: its prefix, and the tensors that may be left over.
        dtype: dtype of the loaded leaves; None keeps each tensor's own, except that float64
            becomes float32. Quantized kernels and fixed leaves are not converted.
        folder: the checkpoint's folder, for messages.
        relabel: whether a head with a different number of labels may be newly initialized.

    Raises:
        WeightsError: Tensors are missing, extra, misshaped or not floating, or a quantized one is
            broken; it lists all of them, with the nearest names.
    """
    named, problems = _canonical_names(tensors, abstract, family)
    wanted = [_expect(path, leaf, named) for path, leaf in paths.walk(abstract)]
    kept = _kept_heads(wanted, family)
    sources: dict[Path, LeafSource] = {}
    held: dict[Path, Mapping[str, LeafSource]] = {}
    new: list[Path] = []
    replaced: list[str] = []
    for one in wanted:
        if one.head and one.path[0] not in kept:
            new.append(one.path)
        elif relabel and one.of_other_labels:
            new.append(one.path)
            replaced += one.misshaped
        elif found := _faults(one, named):
            problems += found
        elif one.packed:
            held[one.path] = _quantized_leaves(list(one.packed.values()), one.layers)
        else:
            sources[one.path] = _source(one, dtype)
    used = {name for one in wanted for name in one.names}
    problems += _extra(named, used, family, head_wanted=bool(kept - {*family.pretrained_heads}))
    if problems:
        where = next(iter(tensors.values())).file.parent if tensors and folder is None else folder
        raise WeightsError(_list_problems(problems, where))
    forms = {packed.form for one in wanted for packed in one.packed.values()}
    return WeightPlan(sources, tuple(new), tuple(replaced), held, *forms)


def _kept_heads(wanted: Sequence[_ExpectedLeaf], family: Family) -> set[str]:
    """Return the head modules that the checkpoint has: all or none, except pretrained ones."""
    alone = {*family.pretrained_heads}
    heads = {one.path[0] for one in wanted if one.head}
    found = {one.path[0] for one in wanted if one.head and one.present}
    return (found & alone) | (heads - alone if found - alone else set())


@dataclass(frozen=True)
class _ExpectedLeaf:
    """The tensors required for a leaf.

    Attributes:
        path: path of the leaf.
        leaf: shape and dtype of the leaf.
        layers: the sizes of the stacked axes.
        names: names of the tensors.
        present: the tensors that the checkpoint has.
    """

    path: Path
    leaf: jax.ShapeDtypeStruct
    layers: tuple[int, ...]
    names: tuple[str, ...]
    present: Mapping[str, AnyTensor]

    @property
    def head(self) -> bool:
        """Whether the leaf belongs to a task's head."""
        return paths.is_head(self.path)

    @property
    def shape(self) -> tuple[int, ...]:
        """The required shape of each tensor."""
        shape = tuple(self.leaf.shape[len(self.layers) :])
        return shape[::-1] if self.path[-1] == "kernel" else shape

    @property
    def misshaped(self) -> dict[str, AnyTensor]:
        """The tensors with a different shape."""
        return {name: tensor for name, tensor in self.present.items() if tensor.shape != self.shape}

    @property
    def packed(self) -> dict[str, Packed]:
        """The tensors that are quantized."""
        return {name: tensor for name, tensor in self.present.items() if isinstance(tensor, Packed)}

    @property
    def of_other_labels(self) -> bool:
        """Whether it is a valid head except for a different number of labels."""
        wrong = self.misshaped.values()
        return (
            self.head
            and bool(wrong)
            and not _unfit(self)
            and all(t.shape[1:] == self.shape[1:] for t in wrong)
        )


def _expect(path: Path, leaf: Any, named: Tensors) -> _ExpectedLeaf:
    layers = paths.stack_shape(path, leaf)
    names = paths.hf_names(path, layers)
    return _ExpectedLeaf(
        path, leaf, layers, names, {name: named[name] for name in names if name in named}
    )


def _faults(one: _ExpectedLeaf, named: Tensors) -> list[str]:
    """List the errors in the tensors of a leaf."""
    found = [f"missing: {name}{nearest(name, named)}" for name in one.names if name not in named]
    if broken := _unfit(one):
        return found + broken
    if one.of_other_labels:
        return found + [
            _other_labels(name, t.shape[0], one.shape[0]) for name, t in one.misshaped.items()
        ]
    found += [
        f"misshaped: {name} is {list(t.shape)}, must be {list(one.shape)}"
        for name, t in one.misshaped.items()
    ]
    return found + [
        _dtype_fault(name, tensor) for name, tensor in one.present.items() if _is_integer(tensor)
    ]


def _source(one: _ExpectedLeaf, dtype: Any | None) -> LeafSource:
    """Return the source of a leaf that is not quantized in the checkpoint."""
    plain = [tensor for tensor in one.present.values() if not isinstance(tensor, Packed)]
    converted = dtype is not None and one.path[-1] not in FIXED
    target = np.dtype(dtype) if converted else _common_dtype(plain)
    return LeafSource(
        tuple(plain), one.leaf.shape, target, len(one.layers), one.path[-1] == "kernel"
    )


def plan_without_tensors(abstract: Tree, dtype: Any, *, new_head: bool) -> WeightPlan:
    """Return the plan for a checkpoint with all leaves in one dtype, for shapes and dtypes only.

    Args:
        abstract: the model's tree of `ShapeDtypeStruct`.
        dtype: dtype of the leaves.
        new_head: whether the head is newly initialized.
    """
    new = tuple(path for path, _ in paths.walk(abstract) if new_head and paths.is_head(path))
    sources = {
        path: LeafSource(
            (),
            leaf.shape,
            np.dtype(np.float32 if path[-1] in FIXED else dtype),
            len(paths.stacks(path)),
            path[-1] == "kernel",
        )
        for path, leaf in paths.walk(abstract)
        if path not in new
    }
    return WeightPlan(sources, new, ())


def _unfit(one: _ExpectedLeaf) -> list[str]:
    """List the reasons why a leaf cannot be loaded from its quantized tensors."""
    packed, count = one.packed, len(one.present)
    if broken := [problem for tensor in packed.values() for problem in tensor.problems]:
        return list(dict.fromkeys(broken))  # experts may share tensors
    if packed and one.path[-1] != "kernel":
        return [f"quantized: {name} does not belong to a linear module" for name in packed]
    if packed and len(packed) < count:
        return [
            (
                f"quantized: {next(iter(packed))}: {count - len(packed)} of the {count} layers"
                " stacked with it are not quantized; set scan_layers=False"
            )
        ]
    if (
        len(
            {
                frozenset((key, t.dtype) for key, t in tensor.leaves.items())
                for tensor in packed.values()
            }
        )
        > 1
    ):
        return [
            (
                f"quantized: {next(iter(packed))}: the layers stacked with it have scales of"
                " different dtypes; set scan_layers=False"
            )
        ]
    return []


def _quantized_leaves(packed: Sequence[Packed], layers: tuple[int, ...]) -> dict[str, LeafSource]:
    """Return the leaves of a quantized kernel, stacked if there is one kernel per layer."""
    return {key: join([one.leaves[key] for one in packed], layers) for key in packed[0].leaves}


def _extra(named: Tensors, used: set[str], family: Family, *, head_wanted: bool) -> list[str]:
    """List the tensors that belong to no leaf.

    The head of another task is ignored, unless the checkpoint also has this task's head: then it
    may be a misspelled tensor of that head.
    """
    extra = [n for n in named if n not in used and not _is_optional(n, family)]
    return [
        f"extra: {name} is not part of this model{nearest(name, used)}"
        for name in extra
        if head_wanted or not paths.is_head(tuple(name.split(".")))
    ]


def _is_optional(name: str, family: Family) -> bool:
    plain = name.removeprefix(family.prefix + ".")
    return any(re.fullmatch(pattern, plain) for pattern in (*family.ignored, *family.optional))


def _other_labels(name: str, labels: int, wanted: int) -> str:
    return (
        f"misshaped: {name} has {labels} labels, but config.json has {wanted}; set"
        f" num_labels={labels} to keep the head, or num_labels={wanted} to initialize a new one"
    )


def _common_dtype(tensors: Sequence[Tensor | UprightTensor]) -> np.dtype[Any]:
    """Return the common dtype of the layers, float32 if they differ; float64 becomes float32."""
    kinds = {tensor.dtype for tensor in tensors}
    (kind,) = kinds if len(kinds) == 1 else (np.dtype(np.float32),)
    return np.dtype(np.float32) if kind == np.float64 else kind


def _list_problems(problems: list[str], folder: Any, most: int = 60) -> list[str]:
    more = [f"... and {len(problems) - most} more"] if len(problems) > most else []
    return (
        [f"{folder}: the weights do not fit the model in config.json ({len(problems)} problems):"]
        + problems[:most]
        + more
    )


def require_sizes(config: Any, tensors: Tensors, family: Family, where: Any) -> None:
    """Raise an error if a config has more layers, experts, tokens or features than the tensors.

    Args:
        config: the model's config, with `num_hidden_layers`, `vocab_size` and `hidden_size`.
        tensors: the checkpoint's tensors.
        family: the architecture.
        where: path of `config.json`, for messages.

    Raises:
        WeightsError: Sizes are too large; it lists each of them with the size in the file.
    """
    layers, experts = (
        max((int(found[1]) + 1 for name in tensors if (found := numbered.search(name))), default=0)
        for numbered in (_LAYER, _EXPERT)
    )
    table = next(
        ((name, t.shape) for name, t in tensors.items() if name.endswith(family.embedding)), None
    )
    found = {"num_hidden_layers": (layers, "layers in the weights")} if layers else {}
    if experts and hasattr(config, "num_experts"):
        found["num_experts"] = (experts, "experts in the weights")
    if table is not None and len(table[1]) == 2:
        narrow = getattr(config, "embedding_size", config.hidden_size) != config.hidden_size
        width = "embedding_size" if narrow else "hidden_size"
        sizes = zip(("vocab_size", width), table[1], strict=True)
        found |= {field: (size, f"in {table[0]}") for field, size in sizes}
    problems = [
        f"{where}: {family.fields.get(field, field)} is {own}, but there are only {size} {of};"
        " config.json belongs to another model, or was edited"
        for field, (size, of) in found.items()
        if (own := getattr(config, field)) > size
    ]
    if problems:
        raise WeightsError(problems)


def untie(tensors: Tensors, folder: Any) -> dict[str, AnyTensor]:
    """Return the tensors of a model with a tied head, with only the embedding's name.

    If the checkpoint has both tensors, they are compared; each of several processes compares its
    part of them.

    Raises:
        WeightsError: Both exist and differ.
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
            f"{folder}: config.json ties the head to the embedding, but lm_head.weight differs from"
            f" {embedding}; set tie_word_embeddings to false in config.json"
        )
    return kept


def _equal(a: AnyTensor, b: AnyTensor, rows: int = 4096) -> bool:
    """Compare this process's part of two tensors, a few rows at a time."""
    if isinstance(a, Packed) or isinstance(b, Packed) or a.shape != b.shape:
        return False
    first, last = (
        a.shape[0] * i // jax.process_count()
        for i in (jax.process_index(), jax.process_index() + 1)
    )
    blocks = ((i, min(i + rows, last)) for i in range(first, last, rows))
    return all(np.array_equal(a.read_rows(*block), b.read_rows(*block)) for block in blocks)


def plain_name(name: str, family: Family) -> str:
    """Return a tensor's name without the backbone's prefix, with old names converted."""
    for pattern, replacement in family.renamed:
        name = re.sub(pattern, replacement, name)
    return name.removeprefix(family.prefix + ".")


def _canonical_names(
    tensors: Tensors, abstract: Tree, family: Family
) -> tuple[dict[str, AnyTensor], list[str]]:
    """Return the checkpoint's tensors by the names that match the model's paths, and the conflicts.

    A file may have the backbone's names with or without the prefix. Tensors that are not part of
    the model keep their names.
    """
    wanted = {
        name
        for path, leaf in paths.walk(abstract)
        for name in paths.hf_names(path, paths.stack_shape(path, leaf))
    }
    out: dict[str, AnyTensor] = {}
    original: dict[str, str] = {}
    problems: list[str] = []
    for file_name, tensor in tensors.items():
        plain = plain_name(file_name, family)
        name = next(
            (one for one in (plain, f"{family.prefix}.{plain}") if one in wanted), file_name
        )
        if name in out:
            problems.append(
                f"twice: {file_name} and {original[name]} are the same part of the model; remove"
                " one of them"
            )
        out[name], original[name] = tensor, file_name
    return out, problems


def _is_integer(tensor: AnyTensor) -> bool:
    return not jnp.issubdtype(tensor.dtype, jnp.floating) or tensor.dtype.itemsize < 2


def _dtype_fault(name: str, tensor: AnyTensor) -> str:
    return (
        f"not floating: {name} is {tensor.dtype} (a quantized checkpoint?); use the unquantized"
        " model"
    )
