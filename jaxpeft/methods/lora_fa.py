r"""LoRA-FA: LoRA whose A stays as it began; B alone is trained.

    y = x W + s (D(x) A) B,    A: [in, r] frozen,  B: [r, out] trained

The gradient of B needs `x A`, `r` numbers a token, and not the input `x` itself, which LoRA keeps for the gradient of A.

Leaves, computation, and files are LoRA's: PEFT knows such an adapter as a plain LoRA, A included, and reading it gives LoRA.

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", section 3
(arXiv:2308.03303).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA of linear sites with A frozen.

    On an embedding A begins at zero, and would leave B without a gradient; such sites are not adapted.

    Raises:
        ConfigError: an option is out of range, or options exclude each other.
    """

    name: ClassVar[str] = "lora_fa"
    paper: ClassVar[str] = "arXiv:2308.03303"
    trained_leaves: ClassVar[frozenset[str]] = frozenset({"lora_b", "lora_bias"})
    kinds: ClassVar[tuple[str, ...]] = ("linear",)

    def problems(self) -> list[str]:
        """Lists options that exclude each other, and the one that needs a trained A."""
        found = super().problems()
        if self.lora_plus_ratio != 1:
            found.append("lora_plus_ratio: compares B with A, and A is not trained; set the learning rate itself")
        return found

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Says no: its files are LoRA's."""
        del config
        return False
