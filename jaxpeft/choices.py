"""What a caller may choose of a model, by name. Without JAX, so that configs and help list it."""

from __future__ import annotations

from typing import Literal, get_args

TrainedTask = Literal["causal_lm", "sequence_classification", "token_classification"]
Task = Literal[TrainedTask, "encoder"]
TASKS: tuple[Task, ...] = get_args(Task)
Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
"""Of a base's leaves and of activations."""

Strategy = Literal["replicated", "fsdp", "tensor", "fsdp_tensor", "sequence", "hybrid_fsdp"]
"""The keys of `jaxpeft.sharding.sizes.STRATEGIES`."""

Pooling = Literal["pooler", "cls", "mean", "last"]
"""What a sequence classifier reads."""

Attention = Literal["xla", "chunked", "cudnn", "splash"]
"""The keys of `jaxpeft.models.attention.KERNELS`."""

ExportTarget = Literal["peft", "merged", "merged_quantized_reference", "vllm", "gguf-lora", "mlx"]
"""The keys of `jaxpeft.export.export_targets.TARGETS`."""

QuantForm = Literal["nf4", "int4", "int8", "fp8", "mxfp4"]
"""The keys of `jaxpeft.kernels.QUANTIZED`."""
