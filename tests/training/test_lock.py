"""Two runs never share a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.training.lock import Lock


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    second = Lock(tmp_path)
    with (
        Lock(tmp_path),
        pytest.raises(ConfigError, match=rf"{tmp_path}: a run is going on there \(.*, pid {os.getpid()}, since "),
    ):
        second.__enter__()
    with Lock(tmp_path):
        pass


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from jaxpeft.training.lock import Lock\n"
        "Lock(Path(sys.argv[1])).__enter__(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (tmp_path / ".lock").exists()
    with Lock(tmp_path):
        pass
