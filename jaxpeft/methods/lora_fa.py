r"""LoRA-FA: LoRA whose A stays as it began; B alone is trained.

    y = x W + s (D(x) A) B,    A: [in, r] frozen,  B: [r, out] trained

The gradient of B needs `x A`, `r` numbers a token, and not the input `x` itself, which LoRA keeps
for the gradient of A.

Leaves, computation, and files are LoRA's: PEFT knows such an adapter as a plain LoRA, A included,
and reading it gives LoRA.

Zhang et al. 2023, "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models
Fine-tuning", section 3 (arXiv:2308.03303).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, SiteSpec
from jaxpeft.methods.lora import LoRA, LoRAFormat


@dataclass(frozen=True)
class LoRAFAFormat(LoRAFormat["LoRAFA"]):
    """How adapters of `LoRAFA` stand in files."""

    def reads(self, kind: type[LoRAFA], config: Mapping[str, Any]) -> bool:
        """Return False: its files are LoRA's."""
        del config
        return False


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA of linear sites with A frozen.

    On an embedding A begins at zero, and would leave B without a gradient; such sites are not
    adapted.

    Raises:
        ConfigError: an option is out of range, or options exclude each other.
    """

    name: ClassVar[str] = "lora_fa"
    paper: ClassVar[str] = "arXiv:2308.03303"
    leaves: ClassVar[LeafSpec] = dataclasses.replace(
        LoRA.leaves,
        trained=frozenset({"lora_b", "lora_bias"}),
    )
    sites: ClassVar[SiteSpec] = dataclasses.replace(
        LoRA.sites,
        kinds=("linear",),
    )
    peft: ClassVar[PeftFormat[Any]] = LoRA.peft.replace(
        LoRAFAFormat,
    )

    def problems(self) -> list[str]:
        """List options that exclude each other, and the one that needs a trained A."""
        found = super().problems()
        if self.lora_plus_ratio != 1:
            found.append(
                "lora_plus_ratio: compares B with A, and A is not trained; set the learning rate"
                " itself"
            )
        return found
