"""The output formats of exports. A new one is a module and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from jaxpeft.export.export_job import Target
from jaxpeft.export.to_gguf_lora import GGUF_LORA
from jaxpeft.export.to_merged import MERGED, MERGED_REFERENCE
from jaxpeft.export.to_mlx import MLX
from jaxpeft.export.to_peft import PEFT
from jaxpeft.export.to_vllm import VLLM

TARGETS: Mapping[str, Target] = {
    "peft": PEFT,
    "merged": MERGED,
    "merged_quantized_reference": MERGED_REFERENCE,
    "vllm": VLLM,
    "gguf-lora": GGUF_LORA,
    "mlx": MLX,
}
"""Every output format by its name on the command line."""
