"""Remat policies: which activations of a layer are saved for the backward pass, and which are
recomputed. Does not import JAX, so that configs can use it.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4 (arXiv:1604.06174).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from jaxpeft.kernels.form import LOW_RANK

Remat = Literal["none", "products", "attention", "full", "offload"]
ATTENTION, PRODUCT, INPUT = "attention", "product", "input"
"""Values of `checkpoint_name`: output of attention, output of a linear module, and input of a
layer.
"""
_IN_TRANSFER = 2
"""Layers whose inputs are on the device at once when inputs are offloaded to host memory."""


@dataclass(frozen=True)
class RematPolicy:
    """A remat policy; all policies save the layers' inputs.

    Attributes:
        again: description of what is recomputed.
        kept: checkpoint names of values saved in addition to the layers' inputs.
        offloaded: checkpoint names of values offloaded to host memory.
        exact: whether exactly these values are saved; otherwise more may be.
    """

    again: str
    kept: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    exact: bool = True

    def nbytes(self, layers: int, layer_input: int, marked: Mapping[str, int]) -> int:
        """Estimate the bytes per device saved for the backward pass.

        Args:
            layers: number of layers.
            layer_input: bytes of a layer's input.
            marked: bytes of one layer's values, by checkpoint name.
        """
        on_device = _IN_TRANSFER if self.offloaded else layers
        return on_device * (layer_input + sum(marked.get(name, 0) for name in self.kept))

    @property
    def estimated(self) -> bool:
        """Whether `nbytes` is accurate enough to choose the policy by."""
        return self.exact and not self.offloaded


_PRODUCTS = (ATTENTION, PRODUCT, LOW_RANK)
REMAT_POLICIES: Mapping[str, RematPolicy] = {
    "none": RematPolicy("nothing", _PRODUCTS, exact=False),
    "products": RematPolicy(
        "norms and activations; saves the outputs of linear modules and attention", _PRODUCTS
    ),
    "attention": RematPolicy(
        "everything but attention; saves its outputs and the layers' inputs", (ATTENTION,)
    ),
    "full": RematPolicy("everything; saves the layers' inputs"),
    "offload": RematPolicy(
        "everything; offloads the layers' inputs to host memory", offloaded=(INPUT,)
    ),
}
"""Policies by name, from the most to the least memory on the device."""


def fastest(nbytes: Callable[[str], float], budget: float) -> str:
    """Return the policy with the least recomputation that fits, or `full`.

    Args:
        nbytes: returns the bytes of a step under a policy.
        budget: bytes that a step may use.
    """
    known = (name for name, policy in REMAT_POLICIES.items() if policy.estimated)
    return next((name for name in known if nbytes(name) <= budget), "full")


def stronger(remat: str) -> tuple[str, ...]:
    """Return the policies that save less on the device, nearest first; empty for `offload`."""
    order = [name for name, policy in REMAT_POLICIES.items() if not policy.offloaded]
    return tuple(order[order.index(remat) + 1 :]) if remat in order else ()
