"""The policies of remat: what the backward pass of a layer finds again, and what it computes again.
Without JAX, for configs.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4 (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxpeft.kernels.form import LOW_RANK

Remat = Literal["none", "products", "attention", "full", "offload"]
ATTENTION, PRODUCT, INPUT = "attention", "product", "input"
"""What values are marked with (`checkpoint_name`): the result of attention, that of a linear
module, and what a layer is given.
"""
_ON_THE_WAY = 2
"""Layers whose inputs are on the device where they wait in the host's memory."""


@dataclass(frozen=True)
class RematPolicy:
    """One policy. The layers' inputs are kept under all of them.

    Attributes:
        again: what the backward pass computes again.
        kept: the marks of the values that are kept beside the layers' inputs.
        offloaded: the marks of those that wait in the host's memory.
        exact: whether no more than that is kept; else as much is, and what differentiation needs
            beside it.
    """

    again: str
    kept: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    exact: bool = True

    def nbytes(self, layers: int, layer_input: int, marked: Mapping[str, int]) -> int:
        """Return about how many bytes of a device wait for the backward pass.

        Args:
            layers: how many there are.
            layer_input: bytes of what one is given.
            marked: bytes of one layer's values, by their marks.
        """
        there = _ON_THE_WAY if self.offloaded else layers
        return there * (layer_input + sum(marked.get(mark, 0) for mark in self.kept))

    @property
    def estimated(self) -> bool:
        """Whether `nbytes` is near enough to choose the policy by it."""
        return self.exact and not self.offloaded


_PRODUCTS = (ATTENTION, PRODUCT, LOW_RANK)
REMAT_POLICIES: Mapping[str, RematPolicy] = {
    "none": RematPolicy("nothing", _PRODUCTS, exact=False),
    "products": RematPolicy(
        "norms and activations; kept are the results of linear modules and of attention", _PRODUCTS
    ),
    "attention": RematPolicy(
        "all but attention; kept are its results and the layers' inputs", (ATTENTION,)
    ),
    "full": RematPolicy("everything; kept are the layers' inputs"),
    "offload": RematPolicy(
        "everything; the layers' inputs wait in the host's memory", offloaded=(INPUT,)
    ),
}
"""Every policy by its name, from the one that keeps most on the device."""


def fastest(nbytes: Callable[[str], float], budget: float) -> str:
    """Return the policy that computes least again of those that fit, `full` where none does.

    Args:
        nbytes: what a step takes under a policy.
        budget: bytes that it may take.
    """
    known = (name for name, policy in REMAT_POLICIES.items() if policy.estimated)
    return next((name for name in known if nbytes(name) <= budget), "full")


def stronger(remat: str) -> tuple[str, ...]:
    """Return the policies that keep less on the device, from the nearest; none for one that uses
    the host's memory.
    """
    order = [name for name, policy in REMAT_POLICIES.items() if not policy.offloaded]
    return tuple(order[order.index(remat) + 1 :]) if remat in order else ()
