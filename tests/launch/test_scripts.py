"""Every script: shellcheck finds nothing, bash can read it, it may be executed, it stops at the
first error.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.helpers import LAUNCH, SCRIPTS, Stubs, bash, mutated, shellcheck

MUTATIONS = {
    "an expansion without quotes": ('"$@"', "$@"),
    "a check by a code that is always 0": (
        "stop_on_problems\n",
        "echo hello; if [ $? -eq 0 ]; then true; fi\n",
    ),
    "a variable that is not set": ("result=0", "resul=0"),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing_at_its_strictest(script: Path) -> None:
    found = shellcheck(script)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_shellcheck_would_find_a_mistake(mutation: str, tmp_path: Path) -> None:
    before, after = MUTATIONS[mutation]
    assert shellcheck(mutated(LAUNCH / "local.sh", before, after, tmp_path)).returncode == 1


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script: Path) -> None:
    assert syntax(script) == (0, "")


def test_bash_would_not_read_a_loop_without_its_end(tmp_path: Path) -> None:
    (tmp_path / "local.sh").write_text((LAUNCH / "local.sh").read_text().replace("  done\n", "", 1))
    code, said = syntax(tmp_path / "local.sh")
    assert code == 2 and "syntax error" in said


def syntax(script: Path) -> tuple[int, str]:
    ended = subprocess.run(
        ["bash", "-n", str(script)], capture_output=True, text=True, timeout=60, check=False
    )
    return ended.returncode, ended.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_it_begins_as_it_should(script: Path) -> None:
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert "\nset -euo pipefail\n" in text
    assert os.access(script, os.X_OK) or script.suffix == ".sbatch"


@pytest.mark.parametrize("script", ["tpu_host.sh", "slurm.sbatch"])
def test_what_runs_as_a_copy_stands_by_itself(script: str) -> None:
    assert "common.sh" not in (LAUNCH / script).read_text()


@pytest.mark.parametrize("script", ["jobset.sh", "local.sh", "slurm.sbatch", "tpu_vm.sh", "xpk.sh"])
def test_a_dry_run_is_on_or_off(script: str, stubs: Stubs) -> None:
    done = bash(LAUNCH / script, "gpu", env=stubs.environment(DRY_RUN="yes"))
    assert done.returncode == 2
    assert f"{script}: DRY_RUN=yes: is not 0 or 1" in done.stderr


def test_there_is_no_script_that_is_not_checked() -> None:
    shells = [
        path for path in LAUNCH.iterdir() if path.is_file() and path.read_text().startswith("#!")
    ]
    assert sorted(shells) == SCRIPTS
