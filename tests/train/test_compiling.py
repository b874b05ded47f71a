"""Where compiled programs are kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jaxpeft.train import compiling


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    told = compiling.cache_folder()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", told)


def test_a_folder_that_is_named_keeps_them_and_off_keeps_none(tmp_path: Path) -> None:
    assert compiling.keep_programs("off") is None and compiling.cache_folder() is None
    assert compiling.keep_programs(str(tmp_path)) == str(tmp_path) == compiling.cache_folder()


@pytest.mark.parametrize("backend", ["cpu", "gpu", "tpu"])
def test_they_are_in_the_users_cache(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path))
    assert compiling.keep_programs("auto") == str(tmp_path / "compiled") == compiling.cache_folder()


_KEPT = """
import sys, jax, jax.numpy as jnp
from jaxpeft.train import compiling
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print(compiling.keep_programs("auto"))
jax.monitoring.register_event_listener(lambda event, **_: print(event) if "cache_hits" in event else None)
print(jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((4, 4))).sum())
"""


@pytest.mark.slow
def test_a_second_process_on_a_cpu_does_not_compile_again(tmp_path: Path) -> None:
    where = {"JAXPEFT_CACHE": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    env = {
        name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"
    } | where
    command = [sys.executable, "-W", "error", "-c", _KEPT]
    first, second = (
        subprocess.run(command, env=env, text=True, capture_output=True, check=True)
        for _ in range(2)
    )
    assert "cache_hits" not in first.stdout and "cache_hits" in second.stdout
    assert first.stdout.splitlines()[-1] == second.stdout.splitlines()[-1]
    assert "cpu_aot_loader" not in second.stderr


def test_programs_compile_at_once_and_stay_in_order() -> None:
    lowered = [jax.jit(lambda x, n=n: x * n).lower(jnp.ones(3)) for n in (2.0, 3.0, 5.0)]
    programs = compiling.compile_each(lowered, jax.devices()[0])
    assert [float(program(jnp.ones(3))[0]) for program in programs] == [2.0, 3.0, 5.0]


def test_the_caches_that_are_off_keep_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("JAXPEFT_CACHE", "off")
    assert compiling.keep_programs("auto") is None and compiling.cache_folder() is None


def test_a_folder_that_jax_is_told_of_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compiling.keep_programs("auto") == str(tmp_path) == compiling.keep_programs("elsewhere")
    assert compiling.keep_programs("off") is None


def test_options_of_a_platform() -> None:
    cuda = SimpleNamespace(
        platform="gpu", client=SimpleNamespace(platform_version="PJRT C API\ncuda 13000")
    )
    rocm = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="rocm 60000"))
    assert compiling.options(cuda) == {"xla_gpu_enable_triton_gemm": False}
    assert compiling.options(rocm) == compiling.options(jax.devices()[0]) == {}
