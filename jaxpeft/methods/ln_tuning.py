"""LayerNorm tuning: only the norms are trained.

    y = scale * (x - mean(x)) / sqrt(var(x) + eps) + bias,
        scale and bias trained; RMSNorm likewise

Zhao et al. 2023, "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning",
section 3 (arXiv:2312.11420).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.core.method import Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.methods.selected import Selected, SelectedFormat


@dataclass(frozen=True)
class LNTuningFormat(SelectedFormat["LNTuning"]):
    """The file format of `LNTuning` adapters."""

    def wrapper(self, method: LNTuning, path: Path, by: Method | None) -> str:
        """Return the name of the copy of the norm that PEFT trains."""
        del path
        return "ln_tuning_layers." if by else ""


@dataclass(frozen=True, kw_only=True)
class LNTuning(Selected):
    """Trains the scale and the bias of the norms; adds no leaves."""

    name: ClassVar[str] = "ln_tuning"
    paper: ClassVar[str] = "arXiv:2312.11420"
    sites: ClassVar[SiteSpec] = dataclasses.replace(
        Selected.sites,
        kinds=("norm",),
    )
    peft: ClassVar[PeftFormat[Any]] = Selected.peft.replace(
        LNTuningFormat,
        type="LN_TUNING",
        options={"target_modules": "targets", "exclude_modules": "exclude"},
    )
    base_leaves: ClassVar[frozenset[str]] = frozenset({"scale", "bias"})
    usual_targets: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
        "post_self_attn_layernorm",
        "post_mlp_layernorm",
        "post_per_layer_input_norm",
        "per_layer_projection_norm",
        "norm",
        "q_norm",
        "k_norm",
        "LayerNorm",
        "sa_layer_norm",
        "output_layer_norm",
        "attn_norm",
        "mlp_norm",
        "final_norm",
    )

    targets: str | tuple[str, ...] = option(
        "default",
        "list of name suffixes, a regular expression, or 'default' for all norms of the known"
        " models",
    )
