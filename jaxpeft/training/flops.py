"""Counting the work of a step, and what the device could do: model FLOP/s utilisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft import kernels
from jaxpeft.core import paths

PEAK_FLOPS: Mapping[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}
"""Dense bf16 FLOP/s of one device, from the vendors' data sheets, by a part of `device_kind`."""


def per_token(trainable: Any, frozen: Any) -> float:
    """Gives the model FLOPs of training on one token.

    A frozen parameter of a matrix costs 4: 2 forward, and 2 backward for the gradient of its input; its own gradient is
    never computed. A trainable one costs 6. An embedding is a look-up and costs nothing; attention is left out.

    Args:
        trainable: the trained part of the tree.
        frozen: the rest.
    """
    return 6.0 * _matrix_parameters(trainable) + 4.0 * _matrix_parameters(frozen)


def _matrix_parameters(tree: Any) -> int:
    leaves = ((path[-1], leaf) for path, leaf in paths.walk(tree))
    return sum(kernels.parameters(name, leaf.shape) for name, leaf in leaves if leaf.ndim >= 2 and name != "embedding")


def peak(devices: Sequence[Any]) -> float | None:
    """Gives the FLOP/s that the devices could do, or None where it is not known (a CPU)."""
    kind = devices[0].device_kind
    known = [name for name in PEAK_FLOPS if name in kind]
    # the longest name: a "TPU v5 lite" is no "TPU v5"
    return PEAK_FLOPS[max(known, key=len)] * len(devices) if known else None
