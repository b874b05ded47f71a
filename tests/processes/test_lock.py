"""Two runs never share a folder."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.errors import ConfigError
from jaxpeft.processes.lock import lock_folder


def test_a_second_run_is_refused_and_told_who_has_the_folder(tmp_path: Path) -> None:
    second = lock_folder(tmp_path)
    with (
        lock_folder(tmp_path),
        pytest.raises(
            ConfigError,
            match=rf"{tmp_path}: another run uses it \(.*, pid {os.getpid()}, since ",
        ),
    ):
        second.__enter__()
    with lock_folder(tmp_path):
        pass


def test_a_killed_run_leaves_the_folder_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from jaxpeft.processes.lock import"
        " lock_folder\nlock = lock_folder(Path(sys.argv[1])); lock.__enter__();"
        " os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (tmp_path / ".lock").exists()
    with lock_folder(tmp_path):
        pass


def test_nothing_is_left_of_a_run_that_has_ended(tmp_path: Path) -> None:
    with lock_folder(tmp_path):
        assert f", pid {os.getpid()}, since " in (tmp_path / ".lock").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_filesystem_without_locks_is_no_folder_for_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    def missing(file: int, how: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    with pytest.raises(OSError, match="not implemented"):
        lock_folder(tmp_path).__enter__()
