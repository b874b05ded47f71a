r"""LoRA-FA: LoRA with a frozen A; only B is trained.

    y = x W + s (D(x) A) B,    A: [in, r] frozen,  B: [r, out] trained

The gradient of B needs only `x A`, `r` numbers per token, and not the input `x`, which LoRA saves
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
    """The file format of `LoRAFA` adapters."""

    def reads(self, kind: type[LoRAFA], config: Mapping[str, Any]) -> bool:
        """Return False: its files are LoRA's."""
        del config
        return False


@dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """LoRA of linear sites with A frozen.

    Embeddings are not adapted: there A starts at zero, so that B would have no gradient.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
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
        """List incompatible options, and the one that needs a trained A."""
        found = super().problems()
        if self.lora_plus_ratio != 1:
            found.append(
                "lora_plus_ratio: has no effect, since A is not trained; set the learning rate"
                " instead"
            )
        return found
