"""Target modules: Hugging Face PEFT's rules, with strict checks.

A list entry matches a module whose name equals it or ends with `.entry`; a string is a regular
expression that must match the full name; `"all-linear"` means every linear module except the
language-model head and the task head. Names are Hugging Face's, with the layer number, so a list
written for PEFT works unchanged.

Unlike in PEFT, an entry, a layer number or a pattern that matches nothing is an error.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, cast

import numpy as np

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.expressions import full_match, require_fast
from jaxpeft.core.paths import Path
from jaxpeft.errors import ConfigError, TargetError, nearest

ALL_LINEAR, ALL = "all-linear", "all"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Site:
    """One module that a method can adapt.

    Attributes:
        path: path of the module, `("model", "layers", "self_attn", "q_proj")`.
        names: its Hugging Face names: one, or one per layer and expert if these are stacked.
        shape: `(in, out)` of a kernel, `(vocab, d)` of an embedding, `(d, d)` of a norm; without
            layer axes.
        layers: sizes of the stacked axes of its leaves, of layers and of experts; empty if they
            are not stacked. Below, a layer of a site is one item of them.
        kind: `linear`, `embedding` or `norm`; the name of the module's type if no method can adapt
            it.
        order: the axes of its kernel, contracted ones first; empty if they already are.
        bias: whether it has a bias.
    """

    path: Path
    names: tuple[str, ...]
    shape: tuple[int, int]
    layers: tuple[int, ...] = ()
    kind: str = "linear"
    order: tuple[int, ...] = ()
    bias: bool = False

    @property
    def name(self) -> str:
        """The Hugging Face name of a site of one layer."""
        return self.names[0]

    @property
    def experts(self) -> bool:
        """Whether it is a module of experts."""
        return paths.EXPERTS in self.path

    def index(self, i: int) -> tuple[int, ...]:
        """Return the index of layer `i` in the stacked axes of the leaves; empty without any."""
        return tuple(int(n) for n in np.unravel_index(i, self.layers))

    def one(self, i: int) -> Site:
        """Return one layer of the site as an unstacked site."""
        return dataclasses.replace(self, names=(self.names[i],), layers=())


@dataclass(frozen=True)
class Targets:
    """The target options of a method, as in PEFT's config.

    Attributes:
        targets: list of name suffixes, a regular expression, `"all-linear"`, or `"all"`.
        exclude: the same, for modules that are not adapted; it takes precedence.
        layers_to_transform: layer numbers; None for all.
        layers_pattern: names of the layer containers; empty to use the first number in a name.
        modules_to_save: names of modules that are fully trained, and so never adapted.
    """

    targets: str | tuple[str, ...]
    exclude: str | tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] | None = None
    layers_pattern: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()


KINDS = ("linear", "embedding", "norm")


def find_sites(params: Mapping[str, Any], kinds: Sequence[str] = ("linear",)) -> list[Site]:
    """List the modules of a tree that can be adapted, judging by their leaves.

    Args:
        params: the parameter tree; its leaves may be abstract.
        kinds: kinds of sites: `linear` (with a two-dimensional kernel), `embedding`, `norm`.
    """
    sites: list[Site] = []
    for path, node in _modules(params):
        layers = _stack_shape(path, node)
        found = kernels.describe(node, len(layers))
        if found is not None and found[0] in kinds:
            names = paths.hf_names(path, layers)
            sites.append(Site(path, names, found[1], layers, found[0], bias="bias" in node))
    return sites


def _modules(
    tree: Mapping[str, Any], prefix: Path = ()
) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Yield the modules that have leaves of their own."""
    if prefix and any(not isinstance(value, Mapping) for value in tree.values()):
        yield prefix, tree
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _modules(cast(Mapping[str, Any], value), (*prefix, key))


def _stack_shape(path: Path, node: Mapping[str, Any]) -> tuple[int, ...]:
    leaves = ((name, leaf) for name, leaf in node.items() if not isinstance(leaf, Mapping))
    return next((paths.stack_shape((*path, name), leaf) for name, leaf in leaves), ())


def resolve(
    params: Mapping[str, Any],
    wanted: Targets,
    kinds: Sequence[str] = ("linear",),
    sites: Sequence[Site] | None = None,
) -> dict[Site, tuple[bool, ...]]:
    """Return the sites to adapt, with a flag for each of their layers.

    Args:
        params: the parameter tree; its leaves may be abstract.
        wanted: the target options.
        kinds: kinds of sites that can be adapted.
        sites: sites of a model that is not jaxpeft's own; None to find them in the tree.

    Returns:
        The matched sites, each with one flag per name.

    Raises:
        TargetError: An entry, a layer number or an expression matches nothing, or all sites are
            excluded; the message lists the nearest site names.
    """
    sites = (
        find_sites(params, kinds)
        if sites is None
        else [site for site in sites if site.kind in kinds]
    )
    names = [name for site in sites for name in site.names]
    require_fast_targets(wanted, names)
    _require_all_used(wanted, names)
    chosen = {
        site: tuple(matches(name, wanted, site.kind) for name in site.names) for site in sites
    }
    chosen = {site: flags for site, flags in chosen.items() if any(flags)}
    if not chosen:
        raise TargetError(
            f"targets {wanted.targets!r} with exclude {wanted.exclude!r} match no site;"
            f" {_sample(names)}"
        )
    return chosen


def require_fast_targets(wanted: Targets, names: Sequence[str]) -> None:
    """Raise an error if a regular expression takes too long to match the names.

    Raises:
        TargetError: An expression is too slow; it names the expression.
    """
    for field, entries in (("targets", wanted.targets), ("exclude", wanted.exclude)):
        require_fast(field, {entries: entries} if isinstance(entries, str) else {}, names)
    require_fast(
        "layers_pattern", {of: _layer_expression(of) for of in wanted.layers_pattern}, names
    )


def is_keyword(targets: str | tuple[str, ...]) -> bool:
    """Return whether targets are the keyword `"all-linear"` or `"all"`."""
    return isinstance(targets, str) and targets.lower() in (ALL_LINEAR, ALL)


def usual_targets(entries: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Return the default targets of a method that exist in a model.

    Args:
        entries: suffixes of site names.
        names: names of all sites.
    """
    return tuple(entry for entry in entries if any(is_named_by(name, (entry,)) for name in names))


def require_kinds(
    method: str, wanted: Targets, sites: Sequence[Site], kinds: Sequence[str]
) -> None:
    """Raise an error if targets match sites that the method cannot adapt.

    Args:
        method: name of the method.
        wanted: the target options.
        sites: sites of all kinds.
        kinds: kinds of sites that it can adapt.

    Raises:
        TargetError: There are such sites; it names them.
    """
    if is_keyword(wanted.targets):
        _report_unknown(wanted, sites)
        return
    entries = wanted.targets if isinstance(wanted.targets, tuple) else (wanted.targets,)
    others = [(site.kind, name) for site in sites if site.kind not in kinds for name in site.names]
    own = [name for site in sites if site.kind in kinds for name in site.names]
    problems: list[str] = []
    for entry in entries:
        one = entry if isinstance(wanted.targets, str) else (entry,)
        hit = [(kind, name) for kind, name in others if is_named_by(name, one)]
        # an entry that matches several kinds selects those that can be adapted; a module whose type
        # no method knows is always an error
        unknown = [
            (kind, name)
            for kind, name in hit
            if kind not in KINDS and not is_named_by(name, wanted.exclude)
        ]
        if unknown or (hit and not any(is_named_by(name, one) for name in own)):
            kind, name = (unknown or hit)[0]
            problems.append(
                f"targets: {entry!r} matches {name}, which is {'an' if kind[0] in 'aeiou' else 'a'}"
                f" {kind} site; {method} adapts {' and '.join(kinds)} sites"
            )
    if problems:
        raise TargetError(problems)


def _report_unknown(wanted: Targets, sites: Sequence[Site]) -> None:
    """Log the modules that a keyword skips because no method can adapt their type."""
    skipped = [f"{site.name} ({site.kind})" for site in sites if site.kind not in KINDS]
    skipped = [name for name in skipped if not is_named_by(name.split(" ")[0], wanted.exclude)]
    if skipped:
        more = f" and {len(skipped) - 5} more" if len(skipped) > 5 else ""
        _log.warning(
            "not adapted, since no method supports their type: %s%s", ", ".join(skipped[:5]), more
        )


def matches(name: str, wanted: Targets, kind: str = "linear") -> bool:
    """Return whether the module with this Hugging Face name and kind is adapted."""
    if (
        is_named_by(name, wanted.exclude)
        or is_under(name, wanted.modules_to_save)
        or paths.is_head(tuple(name.split(".")))
    ):
        return False
    if isinstance(wanted.targets, str):
        if wanted.targets == ALL:
            return _in_layers(name, wanted)
        if wanted.targets.lower() == ALL_LINEAR:
            return (
                kind == "linear"
                and name.split(".")[-1] not in _NOT_ALL_LINEAR
                and _in_layers(name, wanted)
            )
        return full_match(wanted.targets, name) is not None
    # as in PEFT, an entry that is a full name overrides layers_to_transform
    return name in wanted.targets or (
        is_named_by(name, wanted.targets) and _in_layers(name, wanted)
    )


_NOT_ALL_LINEAR = frozenset({"lm_head", "gate", "router"})
"""Last components of the language-model head and of the routers of experts."""


def selects_leaf(method: str, path: Path, leaf: Any, wanted: Callable[[str], bool]) -> bool:
    """Return whether a leaf of the base is trained; a stacked one only in all of its layers.

    Args:
        method: name of the method that trains it.
        path: path of the leaf.
        leaf: the leaf, which may be abstract.
        wanted: whether the module with a Hugging Face name is trained.

    Raises:
        ConfigError: Only some layers of a stacked leaf would be trained.
    """
    flags = [wanted(name) for name in paths.hf_names(path[:-1], paths.stack_shape(path, leaf))]
    if any(flags) and not all(flags):
        raise ConfigError(
            f"{method}: {paths.text(path)} is one stacked leaf, but only {sum(flags)} of its"
            f" {len(flags)} layers are to be trained; select all layers, or load the model with"
            " scan_layers=False"
        )
    return all(flags)


def is_under(name: str, modules: Iterable[str]) -> bool:
    """Return whether a name, or that of an enclosing module, ends with one of `modules`.

    `norm` matches `input_layernorm`, as in PEFT's `modules_to_save`. In `targets`, an entry must
    start after a dot.
    """
    suffixes = tuple(modules)
    return any(parent.endswith(suffixes) for parent in accumulate(name.split("."), "{}.{}".format))


def pattern_value(name: str, patterns: Mapping[str, Any], default: Any) -> Any:
    """Return the value of the first pattern that matches the end of a name, like `rank_pattern` in
    PEFT.
    """
    for pattern, value in patterns.items():
        if full_match(_at_end(pattern), name):
            return value
    return default


def _at_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})"


def require_ends(field: str, patterns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise an error if a pattern is not a literal suffix of a site's name.

    PEFT interprets other patterns differently here: it searches for a dot and the pattern at the
    end of the name, without grouping alternatives.

    Raises:
        TargetError: A pattern is not such a suffix; the message names it.
    """
    odd = [p for p in patterns if re.fullmatch(r"[\w.]+", p) is None or p in names]
    if odd:
        raise TargetError(
            [
                f"{field}: PEFT would interpret {p!r} differently; use the end of a site's name,"
                f" such as {'.'.join(names[0].split('.')[1:])!r}"
                for p in odd
            ]
        )
    require_patterns(field, patterns, names)


def require_patterns(field: str, patterns: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise an error if a pattern matches no adapted site, or takes too long to match.

    Raises:
        TargetError: There is such a pattern; it names it and the nearest site names.
    """
    require_fast(field, {p: _at_end(p) for p in patterns}, names)
    unused = [p for p in patterns if not any(full_match(_at_end(p), name) for name in names)]
    if unused:
        raise TargetError(
            [f"{field}: {p!r} matches no adapted site{_hint(p, names)}" for p in unused]
        )


def is_named_by(name: str, entries: str | tuple[str, ...]) -> bool:
    """Return whether entries match a site name: a regular expression, or a list of suffixes."""
    if isinstance(entries, str):
        return full_match(entries, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def _layer_number(name: str, containers: Sequence[str]) -> int | None:
    for container in containers or (r"[^.]*",):
        found = full_match(_layer_expression(container), name)
        if found:
            return int(found[1])
    return None


def _layer_expression(container: str) -> str:
    return rf"(?:^|.*?\.){container}\.(\d+)\..*"


def _in_layers(name: str, wanted: Targets) -> bool:
    if wanted.layers_to_transform is None:
        return True
    return _layer_number(name, wanted.layers_pattern) in wanted.layers_to_transform


def _require_all_used(wanted: Targets, names: Sequence[str]) -> None:
    problems: list[str] = []
    if isinstance(wanted.targets, tuple):
        for entry in wanted.targets:
            if not any(is_named_by(name, (entry,)) for name in names):
                problems.append(f"targets: {entry!r} matches no site{_hint(entry, names)}")
    elif not is_keyword(wanted.targets) and not any(
        full_match(wanted.targets, name) for name in names
    ):
        problems.append(
            f"targets: the regular expression {wanted.targets!r} matches no full site name;"
            f" {_sample(names)}"
        )
    numbers = {_layer_number(name, wanted.layers_pattern) for name in names} - {None}
    absent = sorted(set(wanted.layers_to_transform or ()) - numbers)
    if absent:
        existing = (
            f"0 to {max(n for n in numbers if n is not None)}" if numbers else "no numbered layers"
        )
        problems.append(
            f"layers_to_transform: no layer {', '.join(map(str, absent))}; the model has {existing}"
        )
    if problems:
        raise TargetError(problems)


def _hint(entry: str, names: Sequence[str]) -> str:
    suffixes = sorted({name.split(".")[-1] for name in names})
    by_suffix = nearest(entry.split(".")[-1], suffixes)
    return by_suffix or f"; {_sample(suffixes)}"


def _sample(names: Sequence[str], n: int = 8) -> str:
    shown = ", ".join(names[:n])
    return (
        f"the model has {len(names)} site names, such as {shown}"
        if names
        else "the model has no linear site"
    )


def report_coverage(sites: Sequence[Site], chosen: Mapping[Site, tuple[bool, ...]]) -> None:
    """Log a table of adapted sites if some of them are adapted only in some layers."""
    total: dict[str, int] = {}
    adapted: dict[str, int] = {}
    for site in sites:
        kind = re.sub(r"\.\d+\.", ".*.", site.names[0])
        total[kind] = total.get(kind, 0) + len(site.names)
        adapted[kind] = adapted.get(kind, 0) + sum(chosen.get(site, ()))
    partial = any(0 < adapted[kind] < total[kind] for kind in total)
    if partial:
        rows = [f"  {adapted[kind]:4d} of {total[kind]:4d}  {kind}" for kind in total]
        _log.warning("some sites are adapted only in some layers:\n%s", "\n".join(rows))


def warn_of_unused(
    field: str, entries: str | tuple[str, ...], sites: Sequence[Site], what: str = "site"
) -> None:
    """Log a warning for each excluded name that matches nothing; it may be misspelled.

    It is no error, because PEFT writes such entries, such as those of a head that is tied.

    Args:
        field: name of the option.
        entries: its value: a list of suffixes, or a regular expression.
        sites: the sites of the model.
        what: what the sites are called in the message.
    """
    names = [name for site in sites for name in site.names]
    for entry in (entries,) if isinstance(entries, str) else entries:
        one = entry if isinstance(entries, str) else (entry,)
        if not any(is_named_by(name, one) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            hint = nearest(entry, known)
            _log.warning("%s: %r matches no %s of this model%s", field, entry, what, hint)
