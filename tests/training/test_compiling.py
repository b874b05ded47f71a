"""Where compiled programs are kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from jaxpeft.training import compiling


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    told = compiling.kept_in()
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    jax.config.update("jax_compilation_cache_dir", told)


def test_on_a_cpu_nothing_is_kept_unless_a_folder_is_named(tmp_path: Path) -> None:
    assert compiling.keep_programs("auto") is None and compiling.kept_in() is None
    assert compiling.keep_programs("off") is None
    assert compiling.keep_programs(str(tmp_path)) == str(tmp_path) == compiling.kept_in()


def test_on_an_accelerator_they_are_in_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path))
    assert compiling.keep_programs("auto") == str(tmp_path / "compiled") == compiling.kept_in()


def test_the_caches_that_are_off_keep_no_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("JAXPEFT_CACHE", "off")
    assert compiling.keep_programs("auto") is None and compiling.kept_in() is None


def test_a_folder_that_jax_is_told_of_stays(tmp_path: Path) -> None:
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    assert compiling.keep_programs("auto") == str(tmp_path) == compiling.keep_programs("elsewhere")
    assert compiling.keep_programs("off") is None


def test_options_of_a_platform() -> None:
    cuda = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="PJRT C API\ncuda 13000"))
    rocm = SimpleNamespace(platform="gpu", client=SimpleNamespace(platform_version="rocm 60000"))
    assert compiling.options(cuda) == {"xla_gpu_enable_triton_gemm": False}
    assert compiling.options(rocm) == compiling.options(jax.devices()[0]) == {}
