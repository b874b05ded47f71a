"""Tests of how a process computes on a CPU."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

_FAULTS = """
import json, resource, sys
import jax, jax.numpy as jnp
from jaxpeft.train import cpu
if sys.argv[1] == "kept":
    cpu.keep_memory()
program = jax.jit(lambda x: jnp.sin(jnp.outer(x, x)) @ x)
x = jnp.ones(3500)
faults = []
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    program(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(min(faults)))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are"
)
def test_the_memory_of_a_step_is_there_for_the_next() -> None:
    def least(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", _FAULTS, how], check=True, capture_output=True, text=True
        )
        return json.loads(done.stdout)

    # more than the 32 MB from which glibc may learn to keep what was freed
    pages = 3500 * 3500 * 4 // 4096
    assert least("not kept") > 0.9 * pages  # of which each is filled with zeros by the kernel
    # a thread with an arena of its own may give its memory back, so one of three runs must keep it
    assert any(least("kept") < 0.1 * pages for _ in range(3))
