"""BitFit: only the biases are trained, those of linear modules and of norms.

Ben Zaken et al. 2021, "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
section 3 (arXiv:2106.10199).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path


@dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains every leaf named `bias`, beside the head; adds no leaves.

    A model without biases (Llama) and without a head has nothing to train, which is refused.
    """

    name: ClassVar[str] = "bitfit"

    def trains(self, path: Path, siblings: Leaves) -> bool:
        """Trains the biases."""
        del siblings
        return path[-1] == "bias"
