"""Which saved step is gone on from: what its folder is called does not make it that step."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

import pytest

from jaxpeft.checkpoint import manifest
from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.errors import DamagedError


def saved(root: Path, *steps: int) -> Path:
    """Make folders of steps that are as good as a run's, without arrays."""
    for step in steps:
        folder = root / str(step)
        folder.mkdir(parents=True)
        (folder / "data").write_text(f"of step {step}")
        manifest.write(folder, step, {"of": step})
    return root


def test_a_renamed_step_is_told_and_the_one_before_is_gone_on_from(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = saved(tmp_path, 10, 20)
    (root / "20").rename(root / "40")
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.latest() == 10
    said = (
        "contains step 20: the folder was renamed or copied; rename it to 20; resuming from step 10"
    )
    assert f"{root / '40'}: {said}" in caplog.text
    checkpoints.put_aside(10)
    assert sorted(path.name for path in root.iterdir()) == ["10", "40.set-aside"]


def test_a_copy_under_another_number_is_none_and_the_original_is_good(tmp_path: Path) -> None:
    root = saved(tmp_path, 10, 20)
    shutil.copytree(root / "10", root / "30")
    assert Checkpoints(root, keep=2).latest() == 20


def test_steps_that_are_all_renamed_are_refused_with_their_numbers(tmp_path: Path) -> None:
    root = saved(tmp_path, 10)
    (root / "10").rename(root / "11")
    with pytest.raises(
        DamagedError,
        match=r"11: contains step 10: .* rename it to 10\nno checkpoint is intact",
    ):
        Checkpoints(root, keep=2).latest()


def test_a_step_of_an_earlier_version_is_believed_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = saved(tmp_path, 10)
    body = json.loads(json.loads((root / "10" / manifest.NAME).read_text())["body"])
    text = json.dumps({key: value for key, value in body.items() if key != "step"})
    (root / "10" / manifest.NAME).write_text(
        json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text})
    )
    with caplog.at_level(logging.WARNING):
        assert Checkpoints(root, keep=2).latest() == 10
    assert (
        "saved by an earlier version, which did not record the step; using the folder name"
        in caplog.text
    )


@pytest.mark.parametrize("name", ["0040", "٤٠", "40.set-aside", "forty", "-40", "4e1", "9" * 200])
def test_a_folder_whose_name_is_no_number_that_we_write_is_no_step(
    tmp_path: Path, name: str
) -> None:
    root = saved(tmp_path, 10)
    shutil.copytree(root / "10", root / name)
    checkpoints = Checkpoints(root, keep=2)
    assert checkpoints.latest() == 10
    checkpoints.put_aside(10)
    assert (root / "10").is_dir()
