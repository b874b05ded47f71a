"""Count model FLOPs and peak device FLOP/s, for model FLOPs utilization (MFU)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxpeft import kernels
from jaxpeft.chips import chip_of
from jaxpeft.core import paths


def per_token(trainable: Any, frozen: Any, active: float = 1.0) -> float:
    """Return the model FLOPs of training on one token.

    A frozen matrix parameter costs 4 FLOPs: 2 forward, and 2 backward for the gradient of the
    input; its own gradient is never computed. A trainable one costs 6. An embedding is a look-up
    and costs nothing. Attention is not counted.

    Args:
        trainable: trainable part of the tree.
        frozen: frozen part of the tree.
        active: share of the experts that a token computes with.
    """
    return 6.0 * _matrix_parameters(trainable, active) + 4.0 * _matrix_parameters(frozen, active)


def active_share(config: Any) -> float:
    """Return the share of a model's experts that a token computes with; 1 without experts.

    Args:
        config: the model's config.
    """
    mixture = getattr(config, "mixture", None)
    return 1.0 if mixture is None else mixture.chosen / mixture.experts


def _matrix_parameters(tree: Any, active: float) -> float:
    return sum(
        kernels.parameters(path[-1], leaf.shape) * (active if paths.EXPERTS in path else 1)
        for path, leaf in paths.walk(tree)
        if leaf.ndim >= 2 and path[-1] != "embedding"
    )


def peak(devices: Sequence[Any]) -> float | None:
    """Return the peak FLOP/s of the devices, or None if unknown (a CPU)."""
    chip = chip_of(devices[0].device_kind)
    return None if chip is None or chip.flops is None else chip.flops * len(devices)
