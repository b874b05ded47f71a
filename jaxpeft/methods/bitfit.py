"""BitFit: only the biases of linear modules and norms are trained.

    y = x W + b,    b trained

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked
Language-models", section 3 (arXiv:2106.10199).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.methods.selected import Selected


@dataclass(frozen=True, kw_only=True)
class BitFit(Selected):
    """Trains the leaves named `bias`, and the head; adds no leaves.

    A model without biases (Llama) and without a head has no trainable parameters, which is an
    error.
    """

    name: ClassVar[str] = "bitfit"
    paper: ClassVar[str] = "arXiv:2106.10199"
    base_leaves: ClassVar[frozenset[str]] = frozenset({"bias"})
