"""Count model FLOPs and peak device FLOP/s, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpeft import kernels
from jaxpeft.chips import chip_of
from jaxpeft.core import paths


def per_token(trainable: Any, frozen: Any) -> float:
    """Return the model FLOPs of training on one token.

    A frozen matrix parameter costs 4 FLOPs: 2 forward, and 2 backward for the gradient of the
    input; its own gradient is never computed. A trainable one costs 6. An embedding is a look-up
    and costs nothing. Attention is not counted.

    Args:
        trainable: trainable part of the tree.
        frozen: frozen part of the tree.
    """
    return 6.0 * _matrix_parameters(trainable) + 4.0 * _matrix_parameters(frozen)


def _matrix_parameters(tree: Any) -> int:
    leaves = ((path[-1], leaf) for path, leaf in paths.walk(tree))
    return sum(
        kernels.parameters(name, leaf.shape)
        for name, leaf in leaves
        if leaf.ndim >= 2 and name != "embedding"
    )


def peak(devices: Sequence[Any]) -> float | None:
    """Return the peak FLOP/s of the devices, or None if unknown (a CPU)."""
    chip = chip_of(devices[0].device_kind)
    return None if chip is None or chip.flops is None else chip.flops * len(devices)
