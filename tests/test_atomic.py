"""What is written is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxpeft import atomic


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("sync", [False, True])
def test_a_text_takes_the_place_of_another(tmp_path: Path, sync: bool) -> None:
    for text in ("one", "another"):
        atomic.write_text(tmp_path / "a.json", text, sync=sync)
        assert (tmp_path / "a.json").read_text() == text
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("unique", [False, True])
@pytest.mark.parametrize("folder", [False, True])
def test_of_a_failure_nothing_is_left(tmp_path: Path, folder: bool, unique: bool) -> None:
    if not folder:
        (tmp_path / "out").write_text("before")

    def fail() -> None:
        with atomic.replace_when_done(tmp_path / "out", unique=unique) as temporary:
            if folder:
                temporary.mkdir()
                (temporary / "a").touch()
            else:
                temporary.write_text("half")
            raise RuntimeError(str(temporary.parent))

    with pytest.raises(RuntimeError, match=f"^{tmp_path}$"):
        fail()
    assert names(tmp_path) == ([] if folder else ["out"])
    assert folder or (tmp_path / "out").read_text() == "before"


def test_a_folder_gets_its_name_at_the_end(tmp_path: Path) -> None:
    with atomic.replace_when_done(tmp_path / "out") as temporary:
        temporary.mkdir()
        (temporary / "a").touch()
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]


def test_what_a_killed_process_has_left_is_written_over(tmp_path: Path) -> None:
    (tmp_path / ".a.json.tmp").write_text("a longer text that was left")
    atomic.write_text(tmp_path / "a.json", "new")
    assert (tmp_path / "a.json").read_text() == "new" and names(tmp_path) == ["a.json"]


def test_processes_that_write_the_same_do_not_meet(tmp_path: Path) -> None:
    with (
        atomic.replace_when_done(tmp_path / "a", unique=True) as one,
        atomic.replace_when_done(tmp_path / "a", unique=True) as other,
    ):
        assert one != other
        one.write_text("1")
        other.write_text("2")
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "1"
