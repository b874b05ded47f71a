"""LayerNorm tuning: only the norms are trained.

    y = scale * (x - mean(x)) / sqrt(var(x) + eps) + bias,    scale and bias trained; RMSNorm likewise

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", section 3
(arXiv:2312.11420).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from jaxpeft.core.method import Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.methods.selected import Selected


@dataclass(frozen=True, kw_only=True)
class LNTuning(Selected):
    """Trains the scale and the bias of the norms; adds no leaves."""

    name: ClassVar[str] = "ln_tuning"
    paper: ClassVar[str] = "arXiv:2312.11420"
    kinds: ClassVar[tuple[str, ...]] = ("norm",)
    base_leaves: ClassVar[frozenset[str]] = frozenset({"scale", "bias"})
    usual_targets: ClassVar[tuple[str, ...]] = (
        "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm", "LayerNorm", "sa_layer_norm",
        "output_layer_norm",
    )  # fmt: skip
    peft_type: ClassVar[str | None] = "LN_TUNING"
    peft_options: ClassVar[Mapping[str, str]] = {"target_modules": "targets", "exclude_modules": "exclude"}

    targets: str | tuple[str, ...] = option(
        "default", "list of name suffixes, a regular expression, or 'default' for all norms of the known models"
    )

    def wrapping(self, path: Path, by: Method | None) -> str:
        """Names the copy of the norm that PEFT trains."""
        del path
        return "ln_tuning_layers." if by else ""
