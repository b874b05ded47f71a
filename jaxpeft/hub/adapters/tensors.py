"""The names and layouts of the trained leaves in an adapter file: one list of entries for both
reading and writing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import chosen_sites, modules_to_save, trainable_mask
from jaxpeft.core.targets import Site, is_under
from jaxpeft.core.tree import FIXED
from jaxpeft.hub.adapters import companions
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.methods.head import Head
from jaxpeft.methods.mixed import Mixed

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class WholeTensor:
    """A tensor of an adapter file that is a fully trained leaf of the base, or one layer of it.

    Attributes:
        name: name of the tensor in the file.
        path: path of the leaf.
        index: index of the layer in a stacked leaf; empty if the leaf is not stacked.
    """

    name: str
    path: Path
    index: tuple[int, ...]

    @property
    def transposed(self) -> bool:
        """Whether torch stores the transpose."""
        return self.path[-1] == "kernel"

    def take(self, leaf: Array) -> Array:
        """Return the tensor from the leaf."""
        part = leaf[self.index]
        return part.T if self.transposed else part

    def put(self, leaf: Array, tensor: Array) -> None:
        """Write the tensor into the leaf, in place."""
        leaf[self.index] = tensor.T if self.transposed else tensor


@dataclass(frozen=True)
class Adapted:
    """One layer of an adapted site, whose tensors the method packs.

    Attributes:
        method: the method that adapts it.
        site: one layer of the site; its path is `()` for the root of the tree.
        index: index of the layer in a stacked site; empty if the site is not stacked.
        fresh: its abstract leaves from the method's `init`, without the padding of a stack.
    """

    method: Method
    site: Site
    index: tuple[int, ...]
    fresh: Mapping[str, Any]

    @property
    def prefix(self) -> str:
        """The prefix of its tensors' names."""
        return f"{self.method.peft.module_prefix}{self.site.name}." if self.site.path else ""

    def take(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Return the tensors from the leaves of the tree, by name."""
        own = {key: np.asarray(leaves[key])[self._region(like)] for key, like in self.fresh.items()}
        packed = (
            self.method.peft.pack(self.method, self.site, own)
            if self.site.path
            else self.method.peft.pack_root(self.method, own)
        )
        return {self.prefix + name: np.asarray(tensor) for name, tensor in packed.items()}

    def put(self, leaves: Mapping[str, Array], tensors: Mapping[str, Array]) -> None:
        """Write the tensors into the leaves of the tree, in place."""
        own = {key: leaves[key][self._region(like)] for key, like in self.fresh.items()}
        selected = self.select(tensors)
        found = (
            self.method.peft.unpack(self.method, self.site, selected, own)
            if self.site.path
            else self.method.peft.unpack_root(self.method, selected, own)
        )
        for key, like in self.fresh.items():
            leaves[key][self._region(like)] = found[key]

    def select(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Return its tensors from those of a file, by their names without the prefix."""
        return {name.removeprefix(self.prefix): tensors[name] for name in self.tensors()}

    def tensors(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shapes and dtypes of the tensors, by name."""
        pack = (
            partial(self.method.peft.pack, self.method, self.site)
            if self.site.path
            else partial(self.method.peft.pack_root, self.method)
        )
        return {
            self.prefix + name: tensor
            for name, tensor in jax.eval_shape(pack, dict(self.fresh)).items()
        }

    def _region(self, like: Any) -> tuple[Any, ...]:
        return (*self.index, *(slice(0, n) for n in like.shape))


def whole_tensors(method: Method, params: Mapping[str, Any]) -> list[WholeTensor]:
    """List the fully trained leaves of the base: heads, `modules_to_save` with their fixed leaves,
    biases.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree; its leaves may be abstract.
    """
    adding = [name for part in method.parts() for name in (*part.leaves.names, *part.leaves.root)]
    wrapped = {name: part for part in method.parts() for name in adapted_names(part, params)}
    saved = modules_to_save(method)
    out: list[WholeTensor] = []
    for path, flag in paths.walk(trainable_mask(method, params)):
        fixed = path[-1] in FIXED and is_under(".".join(path[:-1]), saved)
        if not (flag or fixed) or path[-1] in adding:
            continue
        for name, index in paths.named_items(path, paths.get(params, path)):
            module, _, leaf_name = name.rpartition(".")
            middle = method.peft.wrapper(method, path, wrapped.get(module))
            out.append(
                WholeTensor(
                    f"{method.peft.module_prefix}{module}.{middle}{leaf_name}",
                    path,
                    index,
                )
            )
    return out


def adapted_names(method: Method, params: Mapping[str, Any]) -> list[str]:
    """Return the names of the modules that one method adapts, layer by layer."""
    return [
        n
        for s, on in chosen_sites(method, params).items()
        for n, yes in zip(s.names, on, strict=True)
        if yes
    ]


def find_adapted(method: Method, params: Mapping[str, Any]) -> list[Adapted]:
    """List the adapted sites layer by layer, and the root for each method with leaves there.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree; its leaves may be abstract.
    """
    key = jax.eval_shape(lambda: jax.random.key(0))
    out: list[Adapted] = []
    for part in method.parts():
        for site, on in chosen_sites(part, params).items():
            for i, wanted in enumerate(on):
                if wanted:
                    one = site.one(i)
                    kernel = partial(jnp.zeros, site.shape, jnp.float32)
                    fresh = jax.eval_shape(partial(part.init, one, kernel), key)
                    out.append(Adapted(part, one, site.index(i), fresh))
        root = {name: params[name] for name in part.leaves.root if name in params}
        if root:
            like = {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in root.items()
            }
            out.append(Adapted(part, Site((), ("",), (0, 0)), (), like))
    return out


def to_tensors(method: Method, params: Mapping[str, Any]) -> dict[str, Array]:
    """Return the float32 tensors of the adapter file by name.

    They are C-contiguous, since safetensors scrambles arrays of other layouts.
    """
    out: dict[str, Array] = {}
    host: dict[Path, Array] = {}
    for entry in whole_tensors(method, params):
        if entry.path not in host:
            host[entry.path] = np.asarray(paths.get(params, entry.path), np.float32)
        out[entry.name] = entry.take(host[entry.path])
    for entry in find_adapted(method, params):
        out |= entry.take(paths.get(params, entry.site.path))
    return {name: np.ascontiguousarray(tensor) for name, tensor in out.items()}


def without_copies(
    method: Method, header: Mapping[str, Tensor], base: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Drop the redundant tensors of an adapter file.

    PEFT also writes a saved module under other names, copies of base weights, and a copy of shared
    tensors at each site.

    Args:
        method: method of the adapter.
        header: tensors of the file.
        base: parameters of the base.
    """
    roots = [
        name
        for part in method.parts()
        for name in part.peft.root_tensors.values()
        if name in header
    ]
    shared = {name.rpartition(".")[2]: header[name].read() for name in roots}
    leaves = {
        name: (path, index)
        for path, leaf in paths.walk(base)
        for name, index in paths.named_items(path, leaf)
    }
    kept: dict[str, Tensor] = {}
    for name, tensor in header.items():
        plain = re.sub(r"\.modules_to_save\.(default\.)?", ".", name)
        if ".original_module." in name or (plain != name and plain in header):
            continue
        own = _unwrap(name.removeprefix(method.peft.module_prefix))
        copied = ".base_layer." in name or (_embedding_of(own) and not _saves(method, own))
        if own.endswith(".weight") and copied and own in leaves:
            path, index = leaves[own]
            leaf = np.asarray(paths.get(base, path))[index]
            if np.array_equal(tensor.read(), leaf.T if path[-1] == "kernel" else leaf):
                continue
        once = shared.get(name.rpartition(".")[2])
        if once is not None and name not in roots and np.array_equal(tensor.read(), once):
            continue
        kept[name] = tensor
    return kept


_EMBEDDINGS = ("embed_tokens", "word_embeddings", "tok_embeddings", "lm_head")


def _embedding_of(name: str) -> str | None:
    """Return the embedding or head whose weight has this name (`save_embedding_layers` in PEFT)."""
    module, _, leaf = name.rpartition(".")
    found = module.rpartition(".")[2]
    return found if leaf == "weight" and found in _EMBEDDINGS else None


def _saves(method: Method, name: str) -> bool:
    return any(f".{name}".endswith(f".{module}.weight") for module in modules_to_save(method))


def with_embeddings(
    method: Method, header: Mapping[str, Tensor], base: Mapping[str, Any]
) -> Method:
    """Return a method that also saves the embeddings in a file, such as those with added tokens.

    A method does not adapt the modules that it saves in full, so an embedding that is also adapted
    is saved by a separate part.

    Args:
        method: method of the adapter.
        header: tensors of the file, without copies.
        base: parameters of the base.
    """
    trained = (
        any(part.trains(path, base) for part in method.parts()) for path, _ in paths.walk(base)
    )
    walked = zip(paths.walk(base), trained, strict=True)
    leaves = {name for (path, leaf), own in walked if not own for name in _names(path, leaf)}
    own_names = {name: _unwrap(name.removeprefix(method.peft.module_prefix)) for name in header}
    found = {
        name: _embedding_of(own)
        for name, own in own_names.items()
        if own in leaves and not _saves(method, own)
    }
    found = {name: module for name, module in found.items() if module is not None}
    modules = tuple(sorted(set(found.values())))
    if method.parts() == (method,) and any(".base_layer." in name for name in found):
        return Mixed(methods=(method, Head(modules_to_save=modules)))
    return (
        dataclasses.replace(method, modules_to_save=(*method.modules_to_save, *modules))
        if modules
        else method
    )


def saved_modules(method: Method, params: Mapping[str, Any]) -> list[str]:
    """Return `modules_to_save` for a file: heads, and the modules that the method saves in full.

    An embedding that is also adapted is omitted: PEFT stores it as the base layer inside the
    adapter's module.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
    """
    inside = [
        f".{n}.weight"
        for part in method.parts()
        for n in adapted_names(part, params)
        if _embedding_of(f"{n}.weight")
    ]
    named = {
        name
        for name in modules_to_save(method)
        if not any(n.endswith(f".{name}.weight") for n in inside)
    }
    return sorted(named | {path[0] for path, _ in paths.walk(params) if paths.is_head(path)})


def _unwrap(name: str) -> str:
    """Return the base's name for a tensor that PEFT stores inside an adapter's module."""
    return re.sub(rf"(\.(?:{companions.MODULES}))?\.base_layer\.", ".", name)


def find_outgrown(
    method: Method, header: Mapping[str, Tensor], base: Mapping[str, Any]
) -> list[str]:
    """List the embeddings and heads of an adapter file that have more tokens than the base.

    Args:
        method: method of the adapter.
        header: tensors of the file.
        base: parameters of the base.
    """
    shapes = {
        name: list(leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape)
        for path, leaf in paths.walk(base)
        for name in _names(path, leaf)
        if _embedding_of(name)
    }
    found = (
        (name, tensor, shapes.get(_unwrap(name.removeprefix(method.peft.module_prefix))))
        for name, tensor in header.items()
    )
    return [
        f"misshaped: {name} is {list(tensor.shape)}, must be {wanted}; load the base with"
        f" vocab_size={tensor.shape[0]}"
        for name, tensor, wanted in found
        if wanted and len(tensor.shape) == 2 and tensor.shape[0] > wanted[0]
    ]


def _names(path: Path, leaf: Any) -> tuple[str, ...]:
    return paths.hf_names(path, paths.stack_shape(path, leaf))


def put_tensors(method: Method, params: Mapping[str, Any], tensors: Mapping[str, Array]) -> Tree:
    """Return the rewritten tree with the values of an adapter file.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.
        tensors: tensors of the file, already checked by `differences`.
    """
    host: dict[Path, Array] = {}
    for entry in whole_tensors(method, params):
        leaf = paths.get(params, entry.path)
        entry.put(
            host.setdefault(entry.path, np.zeros(leaf.shape, np.float32)), tensors[entry.name]
        )
    for entry in find_adapted(method, params):
        node = paths.get(params, entry.site.path)
        own = {
            key: host.setdefault((*entry.site.path, key), np.array(node[key]))
            for key in entry.fresh
        }
        entry.put(own, tensors)
    return paths.map_with_path(
        lambda path, leaf: _put_like(host[path], leaf) if path in host else leaf, params
    )


def _put_like(value: Array, leaf: Any) -> Any:
    """Put an array on a leaf's devices; if the leaf is uncommitted, the array is, too."""
    return jax.device_put(value, leaf.sharding) if leaf.committed else jnp.asarray(value)
