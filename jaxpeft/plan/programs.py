"""The step of a run, compiled for devices that need not be there: what it takes of their memory,
and its text.
"""

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

# called temporaries, and the arguments and results are in it
_REQUIRED = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """A compiled step, in bytes of one device.

    Attributes:
        fits: whether the compiler has made a program: it makes none that does not fit.
        total: what it takes, where it does not fit too: arguments, temporaries, results that take
            no place of an argument's, the code.
        text: its HLO; None where the compiler has not written it out.
        problem: why not; empty where it has.
        seconds: that tracing and compiling took.
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
        step: a jitted function.
        arguments: abstract, with their shardings.
        topology: the devices that they lie on.
        limit: bytes that it may take; None for what the chip has.
        held: bytes of the arguments on one device, which a program that does not fit takes at
            least.
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
                "the compiler does not write out a program that does not fit",
            )
            return Compiled(
                False, total, text, "" if text else problem, time.perf_counter() - began
            )
        took = compiled.memory_analysis()
        total = took.argument_size_in_bytes + took.output_size_in_bytes - took.alias_size_in_bytes
        total += took.temp_size_in_bytes + took.generated_code_size_in_bytes
        text, problem = _text(compiled, Path(folder))
    return Compiled(True, total, text, problem, time.perf_counter() - began)


def _options(topology: Topology, limit: float | None, folder: str) -> Mapping[str, Any]:
    """Tell the compiler of TPU programs where to write them, and of a limit below the chip's
    memory, which it heeds as it does that.
    """
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
    """Return the text of a program, or why there is none."""
    try:
        return compiled.as_text(), ""
    except (
        jax.errors.JaxRuntimeError
    ) as error:  # a jaxlib that is older than libtpu does not understand some large programs
        text = read_written(folder)
        why = " ".join(str(error).split())[:200]
        return (
            text,
            (
                ""
                if text
                else f"this program cannot be read ({why}): collectives and FLOPs are not known"
            ),
        )


def read_written(folder: Path) -> str | None:
    """Return the text of a program that the compiler has written to a folder, as it is after its
    optimizations; None where it has not.
    """
    files = sorted(folder.glob("*.after_optimizations.txt"), key=lambda file: file.stat().st_size)
    return files[-1].read_text() if files else None


def gib(nbytes: float) -> str:
    """Write bytes as GiB."""
    return f"{nbytes / GIB:.2f} GiB"
