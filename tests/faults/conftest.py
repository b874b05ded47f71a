"""What the fault tests share: a short run with a fault in it, and the run that nothing happened to."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from tests.training.runs import tiny_models, write_config, write_rows

__all__ = ["tiny_models"]
ROOT = Path(__file__).parents[2]
STEPS = 8
OPTIONS = {
    "method__dropout": 0.1, "train__steps": STEPS, "evaluation__every_steps": 3, "checkpoint__every_steps": 2,
    "log__tensorboard": False, "log__plot": False,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The command of one run."""

    config: Path
    workdir: Path

    def __call__(self, *arguments: str, fault: str | None = None) -> subprocess.CompletedProcess[str]:
        """Runs it, with a fault or without."""
        command = (
            [sys.executable, "-m", "tests.faults.entry", fault, "--"]
            if fault
            else [sys.executable, "-m", "jaxpeft.train"]
        )
        given = ["--config", str(self.config), "--workdir", str(self.workdir), *arguments]
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(self.config.parent / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        return subprocess.run(
            [*command, *given],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            cwd=ROOT,
            env=os.environ | cache,
        )

    def at(self, workdir: Path) -> Job:
        """Gives the same command in another folder."""
        return Job(self.config, workdir)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.workdir / "checkpoints"

    @property
    def steps(self) -> list[int]:
        """The steps that there are folders of."""
        return sorted(int(path.name) for path in self.checkpoints.iterdir() if path.name.isdecimal())

    def digest(self) -> str:
        """Gives the hash of the adapter that the run has saved."""
        tensors = load_file(self.workdir / "adapter" / "adapter_model.safetensors")
        return hashlib.sha256(b"".join(name.encode() + tensors[name].tobytes() for name in sorted(tensors))).hexdigest()


@pytest.fixture
def job(tmp_path: Path, whole: Job) -> Job:
    """A run in a folder of its own."""
    return whole.at(tmp_path / "run")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, tiny_models: Mapping[str, Path]) -> Job:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    rows = write_rows(folder / "rows.jsonl", "single", 60)
    config = write_config(folder / "mine.py", tiny_models["bert"], rows, **OPTIONS)
    made = Job(config, folder / "run")
    done = made()
    assert done.returncode == 0, done.stderr
    return made


def damage(file: Path, how: str) -> None:
    """Flips a bit in the middle of a file, cuts it, or removes it."""
    data = bytearray(file.read_bytes())
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 4
        file.write_bytes(data)


def largest(folder: Path) -> Path:
    """Gives the largest file below a folder: that of the arrays."""
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
