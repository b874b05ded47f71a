"""What is read of a compilation: a program that does not fit, and one that the compiler alone has
written out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.chips import GIB
from jaxpeft.plan import programs, topology

V5E, CPU = topology.read("v5e:2x2"), topology.read("cpu:8")


class Step:
    """A jitted function whose compilation goes as it is told."""

    def __init__(self, outcome: Any, wrote: str = "") -> None:
        self.outcome, self.wrote, self.options = outcome, wrote, dict[str, Any]()

    def lower(self, *arguments: Any) -> Step:
        return self

    def compile(self, compiler_options: dict[str, Any]) -> Any:
        self.options = compiler_options
        if self.wrote:
            (
                programs.Path(compiler_options["xla_dump_to"]) / "m.after_optimizations.txt"
            ).write_text(self.wrote)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


class Unreadable:
    """A compiled program that cannot be written out."""

    def __init__(self, compiled: Any) -> None:
        self.memory_analysis = compiled.memory_analysis

    def as_text(self) -> str:
        raise jax.errors.JaxRuntimeError(
            "INTERNAL: async-update instruction should have 1 operands"
        )


@pytest.mark.parametrize(
    ("said", "total"),
    [
        (
            (
                "the total memory required for HLO temporaries (20.05G) exceeds available HBM"
                " (15.75G)."
            ),
            int(20.05 * GIB),
        ),
        ("Ran out of memory in memory space hbm. Used 1.5T of 15.75G hbm.", int(1.5 * 1024 * GIB)),
        ("HLO temporaries (900.5M) exceeds", int(900.5 * 2**20)),
    ],
)
def test_what_does_not_fit_says_how_much_it_takes(said, total):
    step = Step(jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: {said}"), wrote="HloModule m")
    found = programs.compile_step(step, (), V5E, None, held=7)
    assert (found.fits, found.total, found.text, found.problem) == (False, total, "HloModule m", "")


def test_nothing_may_be_written():
    found = programs.compile_step(
        Step(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")), (), V5E, None, held=7
    )
    assert found.total == 7
    assert (found.text, found.problem) == (
        None,
        "the compiler wrote no HLO for this program, because it does not fit",
    )


def test_another_failure_is_one():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        programs.compile_step(
            Step(jax.errors.JaxRuntimeError("INTERNAL: broken")), (), V5E, None, held=0
        )


def compiled() -> Any:
    return jax.jit(lambda x: x @ x).lower(jnp.ones((8, 8))).compile()


def test_a_program_that_cannot_be_written_out_is_read_from_the_compilers_own_file():
    found = programs.compile_step(
        Step(Unreadable(compiled()), wrote="HloModule m"), (), V5E, None, held=0
    )
    assert (found.fits, found.text, found.problem) == (True, "HloModule m", "")
    found = programs.compile_step(Step(Unreadable(compiled())), (), V5E, None, held=0)
    assert found.text is None
    assert "cannot be read (INTERNAL: async-update" in found.problem


def test_what_the_compiler_is_told():
    step = Step(compiled())
    programs.compile_step(step, (), V5E, 4 * GIB, held=0)
    assert step.options["xla_tpu_max_hbm_size_mib"] == 4096
    programs.compile_step(step, (), V5E, 15.75 * GIB, held=0)
    assert "xla_tpu_max_hbm_size_mib" not in step.options
    programs.compile_step(step, (), CPU, 1e6, held=0)
    assert step.options == {}


def test_the_bytes_of_a_program():
    found = programs.compile_step(Step(compiled()), (), CPU, None, held=0)
    assert found.total >= 2 * 8 * 8 * 4
    assert "HloModule" in (found.text or "")
