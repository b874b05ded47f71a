"""What a method, or a format of quantized kernels, says of its leaves and of the modules that hold
them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


def _any_module(module: Any, name: str) -> bool:
    del module, name
    return True


def _no_factors(leaves: Mapping[str, Any], training: bool) -> None:
    del leaves, training


@dataclass(frozen=True)
class LeafSpec:
    """The leaves that a method adds.

    Attributes:
        site: names of those at a site, the marker first: a site that holds the marker computes with
            the method.
        root: names of those at the root of the tree: what sites share, or what the whole model
            computes with.
        trained: names of those that are trained.
        zero_is_base: whether leaves of zeros compute the base, and stay zero in training: how
            stacked layers that are not adapted are padded. Where not, a leaf beside them says which
            layers are.
        pads: whether zeros behind its leaves add nothing and stay zero in training: how stacked
            layers whose leaves differ in size are padded.
        rank_pads: whether leaves of two adapters that differ in shape differ in rank alone, so that
            zeros make them alike.
    """

    site: tuple[str, ...] = ()
    root: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()
    zero_is_base: bool = True
    pads: bool = True
    rank_pads: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all leaves that a site may hold; the last is the one that says which layers
        are adapted.
        """
        return (*self.site, f"{self.site[0]}_on") if self.site else ()

    @property
    def marker(self) -> str | None:
        """The leaf that shows a method in a tree: of a site, else of the root; None for a method
        that adds no leaf.
        """
        return next(iter((*self.site, *self.root)), None)


@dataclass(frozen=True)
class SiteSpec:
    """Which modules a method can adapt, and by which functions it computes them.

    Attributes:
        kinds: of sites: `linear`, `embedding`, `norm`.
        hooks: from the methods of a module that are computed to the functions, by name, that
            compute them.
        applies: whether a module's method is computed, given the module and the name.
        inputs: what a module's method must take by name, beside its own inputs.
        low_rank: `A [in, r]` and `B [r, out]` of a linear site that computes `x W + x A B`, given
            its leaves and whether it is a training call; None where it computes anything else
            (`jaxpeft.kernels.joint`).
    """

    kinds: tuple[str, ...] = ("linear",)
    hooks: Mapping[str, str] = field(default_factory=lambda: {"__call__": "compute"})
    applies: Callable[[Any, str], bool] = _any_module
    inputs: tuple[str, ...] = ()
    low_rank: Callable[[Mapping[str, Any], bool], tuple[Any, Any] | None] = _no_factors

    def computes(self, module: Any, name: str) -> bool:
        """Return whether a method of a module that holds the marker leaf is computed.

        Args:
            module: a Linen or an NNX module.
            name: of its method.
        """
        return name in self.hooks and self.applies(module, name)


class Computation(Protocol):
    """How a site computes: a class of methods, or a format of quantized kernels.

    The functions that `sites.hooks` names are attributes, each from a `Call` to what the module's
    method gives.
    """

    @property
    def name(self) -> str:
        """What messages call it."""
        ...

    @property
    def leaves(self) -> LeafSpec:
        """The leaves that it computes with."""
        ...

    @property
    def sites(self) -> SiteSpec:
        """The modules that it computes."""
        ...
