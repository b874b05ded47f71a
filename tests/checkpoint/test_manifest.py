"""A step is good or it is not: whatever byte of it is changed, cut or gone."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from jaxpeft.checkpoint import manifest


@pytest.fixture
def step(tmp_path: Path) -> Path:
    folder = tmp_path / "7"
    (folder / "state" / "d").mkdir(parents=True)
    (folder / "state" / "d" / "data").write_bytes(bytes(range(200)))
    (folder / "state" / "_METADATA").write_text("{}")
    manifest.write(folder, 7, {"names": ["a"]})
    return folder


def test_what_was_written_is_good_and_read_back(step: Path) -> None:
    assert manifest.problem(step, 7) is None
    assert manifest.read(step) == {"names": ["a"]}
    assert manifest.is_numbered(step)
    assert not list(step.glob(".*"))


def test_a_copy_elsewhere_is_as_good(step: Path, tmp_path: Path) -> None:
    step.rename(tmp_path / "copy")
    assert manifest.problem(tmp_path / "copy", 7) is None


def test_a_folder_of_another_number_is_not_that_step(step: Path) -> None:
    said = "contains step 7: the folder was renamed or copied; rename it to 7"
    assert [manifest.problem(step, number) for number in (6, 8, 70)] == [said] * 3


def test_a_manifest_of_an_earlier_version_says_no_number(step: Path) -> None:
    body = json.loads(json.loads((step / manifest.NAME).read_text())["body"])
    del body["step"]
    text = json.dumps(body | {"format": 1})
    (step / manifest.NAME).write_text(
        json.dumps({"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text})
    )
    assert manifest.problem(step, 9) is None
    assert not manifest.is_numbered(step)


@pytest.mark.parametrize("byte", range(0, 200, 7))
def test_one_flipped_bit_is_found(step: Path, byte: int) -> None:
    file = step / "state" / "d" / "data"
    data = bytearray(file.read_bytes())
    data[byte] ^= 1 << (byte % 8)
    file.write_bytes(data)
    assert manifest.problem(step, 7) == "state/d/data is damaged: its checksum does not match"


def test_every_byte_of_the_manifest_counts(step: Path) -> None:
    file = step / manifest.NAME
    whole = file.read_bytes()
    for i in range(0, len(whole) - 1, 5):
        changed = bytearray(whole)
        changed[i] ^= 2
        file.write_bytes(changed)
        assert str(manifest.problem(step, 7)).startswith(f"{manifest.NAME} is damaged"), i


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"body": 3, "sha256": ""}', json.dumps({"body": "{}"})]
)
def test_a_manifest_that_is_none_is_damaged(step: Path, text: str) -> None:
    (step / manifest.NAME).write_text(text)
    assert str(manifest.problem(step, 7)).startswith(f"{manifest.NAME} is damaged")


def test_what_is_gone_cut_or_unfinished_is_told(step: Path) -> None:
    file = step / "state" / "d" / "data"
    file.write_bytes(file.read_bytes()[:-1])
    assert manifest.problem(step, 7) == "state/d/data is damaged: its checksum does not match"
    file.unlink()
    assert manifest.problem(step, 7) == "state/d/data is missing"
    (step / manifest.NAME).unlink()
    assert manifest.problem(step, 7) == "has no manifest.json: saving was interrupted"
