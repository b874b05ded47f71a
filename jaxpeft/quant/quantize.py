"""Selecting and quantizing the kernels of a parameter tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import InitVar, dataclass
from functools import lru_cache, partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.expressions import find_expression_fault
from jaxpeft.core.options import take_aliases
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import ALL_LINEAR, Site, Targets
from jaxpeft.core.tree import stack_leaves
from jaxpeft.errors import ConfigError, show
from jaxpeft.kernels import QUANTIZED


@dataclass(frozen=True)
class Quant:
    """How a base is quantized.

    Attributes:
        form: a key of `jaxpeft.kernels.QUANTIZED`.
        targets: linear modules to quantize, like a method's targets: names, a regular expression,
            or `all-linear` (without heads).
        exclude: modules that are not quantized.
        group: number of inputs that share a scale, if the form has groups; None for the default.

    Raises:
        ConfigError: The form does not exist, or has no groups.
    """

    form: str
    targets: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    group: int | None = None
    target_modules: InitVar[str | Sequence[str] | None] = dataclasses.field(
        default=None, kw_only=True
    )
    exclude_modules: InitVar[str | Sequence[str] | None] = dataclasses.field(
        default=None, kw_only=True
    )

    def __post_init__(
        self,
        target_modules: str | Sequence[str] | None,
        exclude_modules: str | Sequence[str] | None,
    ) -> None:
        take_aliases(self, target_modules=target_modules, exclude_modules=exclude_modules)
        if self.form not in QUANTIZED:
            raise ConfigError(
                f"quant: {self.form!r} is not a number format (known: {', '.join(QUANTIZED)})"
            )
        for field in ("targets", "exclude"):
            entries: Any = getattr(self, field)
            if isinstance(entries, list):
                object.__setattr__(self, field, entries := tuple(cast("list[Any]", entries)))
            names = (entries,) if isinstance(entries, str) else entries
            if not isinstance(names, tuple) or not all(isinstance(one, str) for one in names):
                raise ConfigError(
                    f"quant_{field}: must be a string or a list of strings, is {show(entries)}"
                )
            broken = (
                find_expression_fault(entries)
                if isinstance(entries, str) and not targets.is_keyword(entries)
                else None
            )
            if broken:
                raise ConfigError(f"quant_{field}: {broken}")
        group: Any = self.group
        if group is None:
            return
        if not QUANTIZED[self.form].grouped:
            with_groups = " and ".join(name for name, form in QUANTIZED.items() if form.grouped)
            raise ConfigError(
                f"quant_group: is {group}, but {self.form} has no groups; only {with_groups} have"
            )
        if not isinstance(group, int) or isinstance(group, bool) or group < 1:
            raise ConfigError(f"quant_group: must be an integer of at least 1, is {group!r}")

    def __str__(self) -> str:
        """Return the argument for `jaxpeft.load`: the name of the form if all else is default."""
        return repr(self.form) if self == Quant(self.form) else f"jaxpeft.{self!r}"

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, as in `jaxpeft.json`."""
        return dataclasses.asdict(self)

    def sites(self, params: Mapping[str, Any]) -> dict[Path, Site]:
        """Return the sites to quantize, by the path of their kernels.

        Args:
            params: the tree of a base; its leaves may be abstract.

        Raises:
            TargetError: A target matches nothing.
            ConfigError: A kernel does not fit the form, or only some layers of a stacked one are
                selected.
        """
        form, problems = QUANTIZED[self.form], list[str]()
        chosen = targets.resolve(params, Targets(self.targets, self.exclude))
        found = targets.find_sites(params)
        targets.warn_of_unused("quant_exclude", self.exclude, found, "linear module")
        odd: dict[int, str] = {}
        for site in chosen:
            if self.group is not None and site.shape[0] % self.group:
                odd.setdefault(site.shape[0], site.name)
        problems += [
            f"quant_group: {self.group} does not divide the {n} inputs of {name}"
            for n, name in odd.items()
        ]
        for site, on in chosen.items():
            n_in, name = site.shape[0], site.name
            if not all(on):
                problems.append(
                    f"quant: only {sum(on)} of the {len(on)} stacked layers of {name} are selected;"
                    " select all, or set scan_layers=False"
                )
            if n_in % form.multiple:
                wanted = "an even number" if form.multiple == 2 else f"multiples of {form.multiple}"
                problems.append(
                    f"quant: {name} has {n_in} inputs, but {self.form} needs {wanted}; exclude it"
                )
        if problems:
            raise ConfigError(problems)
        return {(*site.path, "kernel"): site for site in chosen}

    @classmethod
    def of(cls, form: str, params: Mapping[str, Any], kernels: Set[Path]) -> Quant:
        """Return the shortest description of kernels that are already quantized.

        Args:
            form: a key of `jaxpeft.kernels.QUANTIZED`.
            params: the tree of a base; its leaves may be abstract.
            kernels: paths of the quantized kernels, at least one.
        """
        sites = targets.find_sites(params)
        linear = list(targets.resolve(params, Targets(ALL_LINEAR)))
        held = {site for site in sites if (*site.path, "kernel") in kernels}
        left = [site for site in linear if site not in held]
        if held <= set(linear):
            return cls(form, exclude=_suffixes(left, sites))
        return cls(form, targets=_suffixes(list(held), sites))

    def abstract(self, shape: tuple[int, int], dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
        """Return shape and dtype of the leaves of one layer's quantized kernel.

        Args:
            shape: shape of the kernel, `(in, out)`.
            dtype: dtype of the kernel.
        """
        return dict(_stored_shapes(self.form, self.group, shape, jnp.dtype(dtype)))

    def store(
        self, whole: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
    ) -> Callable[[Any], dict[str, Any]]:
        """Return the function that quantizes a kernel `[in, out]` into leaves.

        Args:
            whole: wraps a function so that every device of a mesh computes it on unsharded arrays;
                None for a single device.
        """
        form = QUANTIZED[self.form]
        options = {"group": self.group} if form.grouped else {}
        return partial(
            form.store, **options, **({"whole": whole} if form.pooled and whole is not None else {})
        )

    def store_layers(
        self, read: Callable[[tuple[int, ...]], jax.Array], layers: tuple[int, ...]
    ) -> dict[str, jax.Array]:
        """Return the leaves of a quantized kernel; layers are loaded, quantized and freed one by
        one.

        Args:
            read: returns the kernel of the layer with an index, `[in, out]`, on its devices.
            layers: the sizes of the stacked axes.
        """
        store = jax.jit(self.store())
        stored = [jax.block_until_ready(store(read(index))) for index in np.ndindex(layers)]
        return {
            key: stack_leaves([leaves[key] for leaves in stored], layers)
            for key in QUANTIZED[self.form].leaves
        }


@lru_cache(maxsize=1024)
def _stored_shapes(
    form: str, group: int | None, shape: tuple[int, int], dtype: jnp.dtype[Any]
) -> Mapping[str, jax.ShapeDtypeStruct]:
    """Return the abstract leaves of a quantized kernel, traced once for each shape."""
    return jax.eval_shape(Quant(form, group=group).store(), jax.ShapeDtypeStruct(shape, dtype))


def stored_abstract(params: Mapping[str, Any], quant: Quant | None) -> Tree:
    """Return shape and dtype of a base's leaves after quantization.

    Args:
        params: the unquantized tree of a base; its leaves may be abstract.
        quant: the quantization, or None.
    """
    sites = {} if quant is None else quant.sites(params)
    items: list[tuple[Path, Any]] = []
    for path, leaf in paths.walk(params):
        if quant is None or path not in sites:
            items.append((path, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)))
            continue
        for key, part in quant.abstract(sites[path].shape, leaf.dtype).items():
            shape = (*sites[path].layers, *part.shape)
            items.append(((*path[:-1], key), jax.ShapeDtypeStruct(shape, part.dtype)))
    return paths.build(items)


def _suffixes(chosen: list[Site], sites: list[Site]) -> tuple[str, ...]:
    """Name sites by their last component if all sites with it are chosen, else by full names."""
    last = {site: site.name.rpartition(".")[2] for site in sites}
    shared = {last[site] for site in sites if site not in chosen}
    found = {
        name
        for site in chosen
        for name in ([last[site]] if last[site] not in shared else site.names)
    }
    return tuple(sorted(found))


def read_quant(values: Any, where: Any) -> Quant:
    """Return the `Quant` of plain values from `as_dict`.

    Args:
        values: the plain values.
        where: name of the file in messages.

    Raises:
        ConfigError: The values are from an incompatible version.
    """
    if (
        not isinstance(values, Mapping)
        or not {f.name for f in dataclasses.fields(Quant)} >= values.keys()
    ):
        raise ConfigError(f"{where}: quant: {values!r} is not supported by this version of jaxpeft")
    fields = cast("Mapping[str, Any]", values)
    plain: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    try:
        return Quant(**plain)
    except (ConfigError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def quantize(params: Mapping[str, Any], quant: Quant | str) -> Tree:
    """Quantize a base in memory; `load` can quantize while it reads.

    Args:
        params: the tree of a base, without adapter leaves.
        quant: the quantization, or the name of a form.

    Returns:
        The tree, with the leaves of the form in place of each kernel.

    Raises:
        TargetError: A target matches nothing.
        ConfigError: The form does not exist, or a kernel does not fit it.
    """
    how = Quant(quant) if isinstance(quant, str) else quant
    sites = how.sites(params)
    items: list[tuple[Path, Any]] = []
    for path, leaf in paths.walk(params):
        site = sites.get(path)
        if site is None:
            items.append((path, leaf))
            continue
        stored = how.store_layers(leaf.__getitem__, site.layers)
        items += [((*path[:-1], key), made) for key, made in stored.items()]
    return paths.build(items)


def dequantize(params: Mapping[str, Any], dtype: Any = jnp.float32) -> Tree:
    """Return a tree with dequantized kernels; adapter leaves are kept.

    Args:
        params: a tree.
        dtype: dtype of the dequantized kernels.
    """
    items: dict[Path, Any] = dict(paths.walk(params))
    for site in targets.find_sites(params):
        node = {
            key: leaf
            for key, leaf in paths.get(params, site.path).items()
            if not isinstance(leaf, Mapping)
        }
        form = kernels.form_of(node)
        if form is None or not kernels.is_quantized(node):
            continue
        held = {key: items.pop((*site.path, key)) for key in kernels.FORMS[form].leaves}
        layers = ({key: leaf[i] for key, leaf in held.items()} for i in np.ndindex(site.layers))
        decoded = [kernels.read(layer, site.shape).astype(dtype) for layer in layers]
        items[*site.path, "kernel"] = stack_leaves(decoded, site.layers)
    return paths.build(list(items.items()))
