"""The methods, one row each: what the table of properties is tried on. A new method is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jaxpeft

DECODER, ENCODER = "llama", "bert"


@dataclass(frozen=True)
class Row:
    """One method, as it is tried.

    Attributes:
        method: with options for tiny models.
        models: which of the decoder and the encoder it is for.
        other: the same kind of method with other options: another adapter of a bank, None for the same.
        peft: what the real `peft` calls it: the name of a config class and its options; None where peft has no such method.
        moved: how far its trained leaves are moved from where they begin.
        why: why a fresh adapter changes the outputs, for a method that says so.
        scanned: whether stacked layers will do.
        padding: side of the rows that are compared with the real `peft`.
    """

    method: Any
    models: tuple[str, ...] = (DECODER, ENCODER)
    peft: tuple[str, Mapping[str, Any]] | None = None
    moved: float = 0.2
    why: str = ""
    scanned: bool = True
    padding: str = "right"


LINEAR = r".*\.(q_proj|down_proj|query|output\.dense)"
"""Some linear sites of both tiny models."""

ROWS: Mapping[str, Row] = {
    "lora": Row(
        jaxpeft.LoRA(rank=4, alpha=6.0, targets=LINEAR),
        peft=("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    ),
    "lora pissa": Row(jaxpeft.LoRA(rank=4, alpha=6.0, init_weights="pissa")),
    "lora olora": Row(jaxpeft.LoRA(rank=4, alpha=6.0, init_weights="olora")),
    "bitfit": Row(jaxpeft.BitFit(), models=(ENCODER,)),
    "head": Row(jaxpeft.Head(), models=(ENCODER,)),
    "full": Row(jaxpeft.Full()),
}
