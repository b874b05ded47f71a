"""Compile a run's step for devices that may be absent; return its memory and HLO text."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxpeft.chips import GIB
from jaxpeft.plan.topology import Topology

# called temporaries, but includes arguments and results
_REQUIRED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """A compiled step, with bytes per device.

    Attributes:
        fits: whether the compiler produced a program; it does not if the program does not fit.
        total: memory, also if it does not fit: arguments, temporaries, results that do not alias an
            argument, and code.
        text: HLO text; None if the compiler did not write it.
        problem: why there is no text; empty if there is.
        seconds: time of tracing and compiling.
    """

    fits: bool
    total: int
    text: str | None
    problem: str
    seconds: float


def compile_step(
    step: Any, arguments: tuple[Any, ...], topology: Topology, limit: float | None, held: int
) -> Compiled:
    """Compile a step.

    Args:
        step: jitted function.
        arguments: abstract arguments with shardings.
        topology: topology of their devices.
        limit: bytes the program may use; None for the chip's memory.
        held: bytes of the arguments per device, a lower bound if the program does not fit.
    """
    began = time.perf_counter()
    lowered = step.lower(*arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            compiled = lowered.compile(compiler_options=_options(topology, limit, folder))
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            total = max(_search(_USED, str(error)), _search(_REQUIRED, str(error)), held)
            text, problem = (
                read_written(Path(folder)),
                "the compiler wrote no HLO for this program, because it does not fit",
            )
            return Compiled(
                False, total, text, "" if text else problem, time.perf_counter() - began
            )
        sizes = compiled.memory_analysis()
        total = sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        total -= sizes.alias_size_in_bytes
        total += sizes.temp_size_in_bytes + sizes.generated_code_size_in_bytes
        text, problem = _text(compiled, Path(folder))
    return Compiled(True, total, text, problem, time.perf_counter() - began)


def _options(topology: Topology, limit: float | None, folder: str) -> Mapping[str, Any]:
    """Return the TPU compiler's options: where to dump HLO, and a memory limit below the chip's."""
    if topology.chip.platform != "tpu":
        return {}
    options: dict[str, Any] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    if limit is not None and topology.chip.memory is not None and limit < topology.chip.memory:
        options["xla_tpu_max_hbm_size_mib"] = int(limit / 2**20)
    return options


def _search(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0


def _text(compiled: Any, folder: Path) -> tuple[str | None, str]:
    """Return the text of a program, or None and the reason."""
    try:
        return compiled.as_text(), ""
    except (
        jax.errors.JaxRuntimeError
    ) as error:  # a jaxlib older than libtpu cannot read some large programs
        text = read_written(folder)
        why = " ".join(str(error).split())[:200]
        return (
            text,
            (
                ""
                if text
                else f"the program cannot be read ({why}): collectives and FLOPs are unknown"
            ),
        )


def read_written(folder: Path) -> str | None:
    """Return the optimized HLO text that the compiler has dumped to a folder, or None."""
    files = sorted(folder.glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else None


def gib(nbytes: float) -> str:
    """Format bytes as GiB."""
    return f"{nbytes / GIB:.2f} GiB"
