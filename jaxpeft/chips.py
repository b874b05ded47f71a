"""Properties of chips: memory, FLOP/s and bandwidths, with their sources."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """Properties of one chip.

    Attributes:
        name: name in `--topology`.
        platform: `tpu`, `cuda` or `cpu`.
        kind: substring of JAX's `device_kind`.
        memory: bytes available to a program: on a TPU the limit of its compiler (from its
            out-of-memory message), on a GPU the capacity, of which JAX reserves a share.
        flops: dense bfloat16 FLOP/s; None if unknown, like the following.
        bandwidth: memory bandwidth in bytes/s.
        link: one-way bytes/s of one link to a neighbor.
        links: number of links. A TPU has two along each torus axis; all of a GPU's links connect to
            one switch.
        wraps: an axis of a slice is a ring if its length is a multiple of this number, otherwise a
            line; in a 3D slice all axes must be rings. 0 for a switch.
        largest: maximum lengths of the torus axes, ascending; empty for a switch.
        outside: one-way bytes/s per chip of the network between slices or hosts.
        host: number of chips connected by a switch, 0 for a torus.
        sources: sources of the values.
    """

    name: str
    platform: str
    kind: str
    memory: float | None = None
    flops: float | None = None
    bandwidth: float | None = None
    link: float | None = None
    links: int = 0
    wraps: int = 0
    outside: float | None = None
    host: int = 0
    largest: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()


_CLOUD = "https://cloud.google.com/tpu/docs/"
_NVIDIA = "https://www.nvidia.com/en-us/data-center/"
_COMPILER = "memory: the limit that libtpu 0.0.52 names where a program does not fit"
_LINKS = "; a link has that bandwidth divided by its ports, half of it each way"
_RESERVED = (
    "memory: its capacity, of which JAX reserves a share (XLA_PYTHON_CLIENT_MEM_FRACTION, 0.75 by"
    " default)"
)
_NETWORK = "outside: one 400 Gb/s adapter a GPU, as in NVIDIA's DGX systems"

CHIPS: Mapping[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            "v5e",
            "tpu",
            "TPU v5 lite",
            15.75 * GIB,
            197e12,
            819e9,
            50e9,
            4,
            16,
            3.1e9,
            largest=(16, 16),
            sources=(
                (
                    f"{_CLOUD}v5e: 197 TFLOPs, 819 GBps, ICI 400 GBps over 4 ports, 6.4 Tbps"
                    f" outside a pod of 256{_LINKS}"
                ),
                _COMPILER,
            ),
        ),
        Chip(
            "v5p",
            "tpu",
            "TPU v5",
            95.73 * GIB,
            459e12,
            2765e9,
            100e9,
            6,
            4,
            6.2e9,
            largest=(16, 20, 28),
            sources=(
                (
                    f"{_CLOUD}v5p: 459 TFLOPs, 2765 GBps, ICI 1200 GBps over 6 ports, 50 Gbps"
                    f" outside a chip{_LINKS}"
                ),
                _COMPILER,
            ),
        ),
        Chip(
            "v6e",
            "tpu",
            "TPU v6 lite",
            31.24 * GIB,
            918e12,
            1638e9,
            100e9,
            4,
            16,
            12.5e9,
            largest=(16, 16),
            sources=(
                f"{_CLOUD}v6e: 918 TFLOPs, 1638 GBps, ICI 800 GBps over 4 ports{_LINKS}",
                _COMPILER,
                "outside: 100 Gb/s a chip, an assumption",
            ),
        ),
        Chip(
            "h100",
            "cuda",
            "H100",
            80e9,
            989e12,
            3350e9,
            25e9,
            18,
            0,
            50e9,
            8,
            sources=(
                (
                    f"{_NVIDIA}h100/: SXM, 80 GB, 989 TFLOPS dense, 3.35 TB/s, NVLink 900 GB/s both"
                    " ways"
                ),
                _RESERVED,
                _NETWORK,
            ),
        ),
        Chip(
            "h200",
            "cuda",
            "H200",
            141e9,
            989e12,
            4800e9,
            25e9,
            18,
            0,
            50e9,
            8,
            sources=(
                (
                    f"{_NVIDIA}h200/: SXM, 141 GB, 989 TFLOPS dense, 4.8 TB/s, NVLink 900 GB/s both"
                    " ways"
                ),
                _RESERVED,
                _NETWORK,
            ),
        ),
        Chip(
            "cpu",
            "cpu",
            "cpu",
            sources=("properties of CPUs are unknown: give the memory with --hbm",),
        ),
    )
}
"""Chips that plans support, by name in `--topology`."""
_SHEET = "the vendor's data sheet"
_OTHERS = tuple(
    Chip(name, platform, kind, flops=flops, sources=(_SHEET,))
    for name, platform, kind, flops in (
        ("v4", "tpu", "TPU v4", 275e12),
        ("v7x", "tpu", "TPU7x", 2307e12),
        ("a100", "cuda", "A100", 312e12),
        ("b200", "cuda", "B200", 2250e12),
        ("l4", "cuda", "L4", 121e12),
        ("l40s", "cuda", "L40S", 362e12),
    )
)
"""Chips with only their FLOP/s."""
_KINDS: Mapping[str, Chip] = {
    **{chip.kind: chip for chip in (*CHIPS.values(), *_OTHERS)},
    "TPU v5e": CHIPS["v5e"],
    "TPU v5p": CHIPS["v5p"],
    "TPU v6e": CHIPS["v6e"],
}
"""Chips by substring of JAX's `device_kind`; some have two."""


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip with JAX's `device_kind`, or None if unknown."""
    known = [kind for kind in _KINDS if kind in device_kind]
    # the longest match: a "TPU v5 lite" is not a "TPU v5"
    return _KINDS[max(known, key=len)] if known else None


def usable(chip: Chip, limit_gib: float | None) -> float | None:
    """Return the bytes of a chip's memory that a step may use, or None if unknown.

    Args:
        chip: the chip.
        limit_gib: limit of the caller in GiB; None for the chip's memory.
    """
    if limit_gib is not None:  # a TPU's compiler does not use more than its own limit
        limit = limit_gib * GIB
        return min(limit, chip.memory) if chip.platform == "tpu" and chip.memory else limit
    if chip.memory is None or chip.platform != "cuda":
        return chip.memory
    return chip.memory * float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75"))
