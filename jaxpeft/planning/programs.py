"""The step of a run, compiled for devices that need not be there: what it takes of their memory, and its text."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from jaxpeft.planning.chips import GIB
from jaxpeft.planning.topology import Topology

_TEMPORARIES = re.compile(r"HLO temporaries \(([\d.]+)([KMGT]?)\)")
_USED = re.compile(r"Used ([\d.]+)([KMGT]?) of")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Compiled:
    """A compiled step, in bytes of one device.

    Attributes:
        arguments: state, frozen leaves and batch, with the padding of their layouts.
        results: those that take no place of an argument's.
        temporaries: what lives while it runs.
        code: the program itself.
        text: its HLO; None where the compiler cannot write it out.
        problem: why not, or why there is no program: it does not fit. Empty where all is well.
        total: the bytes that it takes, where it does not fit too.
        seconds: that tracing and compiling took.
    """

    arguments: int
    results: int
    temporaries: int
    code: int
    text: str | None
    problem: str
    total: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the compiler has made a program."""
        return not self.problem.startswith(_TOO_LARGE)


_TOO_LARGE = "the compiler makes no program that does not fit"


def compile_step(step: Any, arguments: tuple[Any, ...], topology: Topology, limit: float | None, held: int) -> Compiled:
    """Compiles a step.

    Args:
        step: a jitted function.
        arguments: abstract, with their shardings.
        topology: the devices that they lie on.
        limit: bytes that it may take; None for what the chip has.
        held: bytes of the arguments on one device, where the program does not say.
    """
    began = time.perf_counter()
    lowered = step.lower(*arguments)
    try:
        compiled = lowered.compile(compiler_options=_options(topology, limit))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        temporaries = _said(_TEMPORARIES, str(error))
        total = _said(_USED, str(error)) or temporaries + held
        return Compiled(held, 0, total - held, 0, None, _TOO_LARGE, total, time.perf_counter() - began)
    took = compiled.memory_analysis()
    made = took.output_size_in_bytes - took.alias_size_in_bytes
    code = took.generated_code_size_in_bytes
    text, problem = _text(compiled)
    total = took.argument_size_in_bytes + made + took.temp_size_in_bytes + code
    return Compiled(
        took.argument_size_in_bytes, made, took.temp_size_in_bytes, code, text, problem, total, time.perf_counter() - began
    )  # fmt: skip


def _options(topology: Topology, limit: float | None) -> Mapping[str, Any]:
    """Tells the compiler of TPU programs of a limit below the chip's memory: it computes again what does not fit otherwise."""
    if (
        topology.chip.platform != "tpu"
        or limit is None
        or topology.chip.memory is None
        or limit >= topology.chip.memory
    ):
        return {}
    return {"xla_tpu_max_hbm_size_mib": int(limit / 2**20)}


def _said(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    return int(float(found.group(1)) * _UNITS[found.group(2)]) if found else 0


def _text(compiled: Any) -> tuple[str | None, str]:
    try:
        return compiled.as_text(), ""
    except jax.errors.JaxRuntimeError as error:  # of some large programs, with jax 0.10
        why = " ".join(str(error).split())[:200]
        return None, f"the compiler does not write this program out ({why}): collectives and FLOPs are not known"


def gib(nbytes: float) -> str:
    """Writes bytes as GiB."""
    return f"{nbytes / GIB:.2f} GiB"
