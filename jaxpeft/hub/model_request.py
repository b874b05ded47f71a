"""What is asked of a pretrained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.choices import DTYPES, TASKS, Task
from jaxpeft.errors import ConfigError
from jaxpeft.models.attention import KERNELS, fastest, platform
from jaxpeft.quant.quantize import Quant


@dataclass(frozen=True)
class ModelRequest:
    """What is asked of a pretrained model: its head, and how it is stored and computes. The fields
    are the arguments of `load`.

    Attributes:
        task: which head; `encoder` gives hidden states.
        num_labels: of a classification head; None takes it from the labels in `config.json`.
        dtype: of the base's leaves; None keeps the checkpoint's.
        compute_dtype: of the activations; None takes `dtype`, or the checkpoint's.
        scan_layers: whether the layers are stacked and scanned.
        pooling: what a sequence classifier reads; None takes the architecture's own.
        remat: what the backward pass computes again.
        attention: the kernel that computes attention; `auto` takes the fastest of the platform.
        vocab_size: of the embedding and the language-model head, where tokens were added; None
            keeps the model's.
        quant: which kernels are quantized as they are read, and how; None for none.
        right_padded: whether rows are padded behind their tokens alone, of which a decoder's
            attention then need not be told.

    Raises:
        ConfigError: a task, a dtype or a kernel of attention is none that is known.
    """

    task: Task
    num_labels: int | None = None
    dtype: Any = None
    compute_dtype: Any = None
    scan_layers: bool = False
    pooling: str | None = None
    remat: str = "none"
    attention: str = "auto"
    vocab_size: int | None = None
    quant: Quant | None = None
    right_padded: bool = False

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ConfigError(f"task: must be one of {', '.join(TASKS)}, is {self.task!r}")
        for name in ("dtype", "compute_dtype"):
            object.__setattr__(self, name, _float_dtype(name, getattr(self, name)))
        if self.attention not in ("auto", *KERNELS):
            raise ConfigError(
                f"attention: must be one of auto, {', '.join(KERNELS)}, is {self.attention!r}"
            )

    @property
    def kernel(self) -> str:
        """The kernel that computes attention, a key of `KERNELS`."""
        return fastest(platform(jax.devices()[0])) if self.attention == "auto" else self.attention


def _float_dtype(name: str, dtype: Any) -> Any:
    if dtype is None:
        return None
    known = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ConfigError(f"{name}: {dtype!r} is no dtype; give {known}") from None
    if found.name not in DTYPES:
        raise ConfigError(f"{name}: must be {known}, is {found}")
    return found
