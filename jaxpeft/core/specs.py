"""Specifications of the leaves and modules of a method or a quantized format."""

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
class LowRank:
    """What a method adds to a module outside of training: `x W + s x A B`.

    Attributes:
        a: `[in, r]`, or `[vocab, r]` of an embedding.
        b: `[r, out]`.
        scale: s.
        magnitude: if not None, `[out]`: the norms to which the columns of `W + s A B` are scaled,
            as in DoRA.
    """

    a: Any
    b: Any
    scale: Any
    magnitude: Any = None


def _no_update(shape: tuple[int, int], leaves: Mapping[str, Any]) -> None:
    del shape, leaves


@dataclass(frozen=True)
class LeafSpec:
    """The leaves that a method adds.

    Attributes:
        site: names of the leaves at a site, the marker first: a site with the marker is computed by
            the method.
        root: names of the leaves at the root of the tree, used by all sites or by the model.
        trained: names of the trained leaves.
        zero_is_base: whether leaves of zeros compute the base and stay zero in training. Unadapted
            layers of a stack are zeros; otherwise, an extra leaf marks the adapted layers.
        pads: whether zero padding of its leaves has no effect and stays zero in training, so that
            stacked layers may have leaves of different sizes.
        rank_pads: whether the leaves of two adapters differ only in rank, so that they can be
            padded to the same shape.
    """

    site: tuple[str, ...] = ()
    root: tuple[str, ...] = ()
    trained: frozenset[str] = frozenset()
    zero_is_base: bool = True
    pads: bool = True
    rank_pads: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all leaves that a site may have; the last one marks the adapted layers."""
        return (*self.site, f"{self.site[0]}_on") if self.site else ()

    @property
    def marker(self) -> str | None:
        """The leaf that identifies a method, at a site or else at the root; None without leaves."""
        return next(iter((*self.site, *self.root)), None)


@dataclass(frozen=True)
class SiteSpec:
    """The modules that a method can adapt, and the functions that compute them.

    Attributes:
        kinds: kinds of sites: `linear`, `embedding`, `norm`.
        hooks: maps names of a module's methods to names of the functions that compute them.
        applies: `(module, name) -> bool`: whether a module's method is computed.
        inputs: further keyword arguments that a module's method must accept.
        low_rank: `(leaves, training) -> (A [in, r], B [r, out])` of a linear site that computes
            `x W + x A B`, or None if it computes anything else (`jaxpeft.kernels.joint`).
        update: `((in, out), leaves) -> LowRank`: what the method adds to a site outside of
            training, from the leaves of the site and of the root; None if it is no low-rank update,
            the only kind that most servers can hold.
    """

    kinds: tuple[str, ...] = ("linear",)
    hooks: Mapping[str, str] = field(default_factory=lambda: {"__call__": "compute"})
    applies: Callable[[Any, str], bool] = _any_module
    inputs: tuple[str, ...] = ()
    low_rank: Callable[[Mapping[str, Any], bool], tuple[Any, Any] | None] = _no_factors
    update: Callable[[tuple[int, int], Mapping[str, Any]], LowRank | None] = _no_update

    def computes(self, module: Any, name: str) -> bool:
        """Return whether the method of a module with the marker leaf is computed.

        Args:
            module: a Linen or an NNX module.
            name: name of the module's method.
        """
        return name in self.hooks and self.applies(module, name)


class Computation(Protocol):
    """The computation of a site: a method class, or a quantized format.

    The functions named in `sites.hooks` are attributes; each takes a `Call` and returns the output
    of the module's method.
    """

    @property
    def name(self) -> str:
        """The name in messages."""
        ...

    @property
    def leaves(self) -> LeafSpec:
        """The leaves that it computes with."""
        ...

    @property
    def sites(self) -> SiteSpec:
        """The modules that it computes."""
        ...
