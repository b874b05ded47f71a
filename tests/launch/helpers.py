"""What tests of launch/ share: its files, and stand-ins for the programs of clouds and clusters."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
IMAGE = "us-docker.pkg.dev/project/images/jaxpeft:0.1.0-tpu"

_STUB = """#!{python} -I
import json, os, sys
with open({log!r}, "a") as log:
    text = "" if sys.stdin is None or sys.stdin.isatty() else sys.stdin.read()
    log.write(json.dumps({{"name": {name!r}, "arguments": sys.argv[1:], "stdin": text, "environment": dict(os.environ)}}) + "\\n")
if os.path.exists({answer!r}):
    into, out = os.pipe()
    os.write(out, text.encode())
    os.close(out)
    os.dup2(into, 0)
    os.execv("/bin/bash", ["bash", {answer!r}, *sys.argv[1:]])
"""


class Stubs:
    """A folder of programs, first on PATH, that note how they are called and answer what a test has
    them answer.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "calls.jsonl"
        (folder / "bin").mkdir(parents=True)

    def add(self, name: str, answer: str | None = None) -> Path:
        """Add a program; `answer` is a bash script that gets its arguments."""
        program, script = self.folder / "bin" / name, self.folder / f"{name}.answer"
        program.write_text(
            _STUB.format(python=sys.executable, log=str(self.log), name=name, answer=str(script)),
            encoding="utf-8",
        )
        program.chmod(0o755)
        if answer is not None:
            script.write_text(answer, encoding="utf-8")
        return program

    def calls(self, name: str | None = None) -> list[list[str]]:
        """Return the calls so far, each as the program's name and its arguments; those of one
        program without the name.
        """
        noted = self.noted()
        if name is None:
            return [[call["name"], *call["arguments"]] for call in noted]
        return [call["arguments"] for call in noted if call["name"] == name]

    def noted(self) -> list[dict]:
        """Return the calls so far, with standard input and the environment of each."""
        return (
            [json.loads(line) for line in self.log.read_text().splitlines()]
            if self.log.exists()
            else []
        )

    def environment(self, **more: str) -> dict[str, str]:
        """Return a small environment in which the stubs are found first."""
        kept = {name: os.environ[name] for name in ("HOME", "LANG", "TMPDIR") if name in os.environ}
        return {**kept, "PATH": f"{self.folder / 'bin'}:/usr/local/bin:/usr/bin:/bin", **more}


def bash(
    script: Path | str, *arguments: str, env: dict[str, str], cwd: Path = ROOT, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run a script of launch/."""
    return subprocess.run(
        ["bash", str(script), *arguments],
        env=env,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def tool(name: str) -> str:
    """Return the path of a linter that comes as a Python package, skips the test where it is not
    installed.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install -e '.[test]'")
    return found


def shellcheck(path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Lints a shell script at its strictest."""
    return subprocess.run(
        [
            tool("shellcheck"),
            "--norc",
            "--severity=style",
            "--shell=bash",
            "--external-sources",
            *options,
            str(path),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def mutated(file: Path, before: str, after: str, folder: Path) -> Path:
    """Write a file of launch/ with one mistake in it, into a folder launch/ beside everything else
    of launch/.
    """
    text = file.read_text()
    assert before in text, f"{file.name} does not have {before!r}"
    copy = folder / "launch"
    shutil.copytree(LAUNCH, copy, dirs_exist_ok=True)
    (copy / file.name).write_text(text.replace(before, after, 1))
    return copy / file.name
