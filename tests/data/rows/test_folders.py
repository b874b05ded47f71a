"""Folders whose sub-folders are labels, and those that `datasets` saves."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.data.rows.folders import sibling_split
from jaxpeft.data.rows.read import read_rows
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.errors import DataError


def make(root: Path, *names: str, text: str = "a film") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def labels(folder: Path, split: str = "train") -> list[tuple[str, str]]:
    rows = read_rows(folder, split=split)
    return [
        (Path(place).relative_to(folder).as_posix(), record["label"])
        for (place, _), record in zip(rows.places, rows.records, strict=True)
    ]


IMDB = (
    "README",
    "imdb.vocab",
    "imdbEr.txt",
    "train/urls_pos.txt",
    "train/urls_unsup.txt",
    "train/labeledBow.feat",
    "train/pos/0_9.txt",
    "train/neg/0_3.txt",
    "train/neg/1_1.txt",
    "train/unsup/0_0.txt",
    "test/urls_neg.txt",
    "test/pos/0_10.txt",
    "test/neg/0_2.txt",
)


def test_imdb_as_it_is_published(tmp_path: Path) -> None:
    folder = make(tmp_path / "aclImdb", *IMDB)
    wanted = [("neg/0_3.txt", "neg"), ("neg/1_1.txt", "neg"), ("pos/0_9.txt", "pos")]
    assert labels(folder) == [(f"train/{name}", label) for name, label in wanted]
    assert labels(folder / "train") == wanted
    assert labels(folder, "test") == [("test/neg/0_2.txt", "neg"), ("test/pos/0_10.txt", "pos")]
    assert labels(tmp_path)[0] == ("aclImdb/train/neg/0_3.txt", "neg")
    assert read_rows(folder).notes == (
        (
            f"{folder}: labels are the subfolders neg, pos; skipped unlabeled files: 2 in no"
            " subfolder, 1 in unsup"
        ),
    )
    before = read_rows(folder)
    (folder / "train" / "pos").rename(folder / "train" / "good")
    after = read_rows(folder)
    assert before.sha256 != after.sha256
    assert before.source != after.source


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["spam/1.txt", "ham/1.2.ham.txt", "Summary.txt"], {"spam", "ham"}),
        (["x/bbc/tech/001.txt", "x/bbc/sport/001.txt", "x/bbc/README.TXT"], {"tech", "sport"}),
        (["pos/train/1.txt", "neg/train/1.txt", "pos/test/1.txt"], {"pos", "neg"}),
        (["alt.atheism/49960", "sci.space/60155"], {"alt.atheism", "sci.space"}),
        (["pos/part1/a.txt", "neg/part1/a.txt"], {"pos", "neg"}),
        (["__MACOSX/pos/._1.txt", "pos/1.txt", "neg/1.txt"], {"pos", "neg"}),
    ],
    ids=["spam", "deeper", "splits below", "no ending", "parts", "zip of macOS"],
)
def test_two_or_more_folders_of_texts_are_labels(
    tmp_path: Path, names: list[str], wanted: set[str]
) -> None:
    folder = make(tmp_path / "data", *names)
    found = labels(folder)
    assert {label for _, label in found} == wanted
    assert all(label in Path(place).parts for place, label in found)


@pytest.mark.parametrize(
    "names", [["a.txt", "b.txt"], ["only/a.txt", "b.txt"], ["pos/a.txt", "unsup/b.txt"]]
)
def test_other_folders_of_texts_have_no_labels(tmp_path: Path, names: list[str]) -> None:
    assert read_rows(make(tmp_path / "data", *names)).columns() == ["text"]


@pytest.mark.parametrize(
    ("names", "given", "split", "wanted"),
    [
        (IMDB, "aclImdb", "test", "aclImdb"),
        (IMDB, "aclImdb/train", "test", "aclImdb/test"),
        (IMDB, "aclImdb/train", "validation", None),
        (["train.csv", "dev.csv"], ".", "validation", "."),
        (["train.csv", "dev.csv"], ".", "test", None),
        (["a.csv"], ".", "test", None),
    ],
)
def test_other_splits_are_found_beside(
    tmp_path: Path, names: list[str], given: str, split: str, wanted: str | None
) -> None:
    make(tmp_path / ("aclImdb" if names is IMDB else "."), *names)
    found = sibling_split(tmp_path / given, split)
    assert found == (None if wanted is None else tmp_path / wanted)


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """Save a data set, as one or as splits, and return its folder and its rows."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )

    def save(form: str) -> Path:
        one = datasets.Dataset.from_dict(
            {"text": ["a", "b", "c"], "label": [1, 0, -1]}, features=features
        )
        if form == "parquet":
            one.to_parquet(str(tmp_path / "x.parquet"))
            return tmp_path / "x.parquet"
        data = (
            datasets.DatasetDict({"train": one, "test": one.select([0])})
            if form == "splits"
            else one
        )
        data.save_to_disk(str(tmp_path / "saved"))
        if form == "file":
            return tmp_path / "saved" / "data-00000-of-00001.arrow"
        (tmp_path / "saved" / "cache-1.arrow").write_bytes(b"made of it later")
        return tmp_path / "saved"

    return save


@pytest.mark.parametrize("form", ["one", "splits", "file", "parquet"])
def test_what_datasets_has_saved_keeps_the_names_of_its_labels(saved: Any, form: str) -> None:
    path = saved(form)
    if form == "splits":
        (path / "cache-1.arrow").unlink()
        assert read_rows(path, split="test").records == [{"text": "a", "label": "good"}]
    wanted = [
        {"text": "a", "label": "good"},
        {"text": "b", "label": "bad"},
        {"text": "c", "label": None},
    ]
    assert read_rows(path).records == wanted
    assert RowStream(str(path), "train").rows(0, 9).records == wanted


def test_a_state_that_cannot_be_trusted_is_refused(saved: Any) -> None:
    folder = saved("one")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(
        json.dumps(state | {"_indices_data_files": [{"filename": "x.arrow"}]})
    )
    with pytest.raises(
        DataError, match=r"state\.json: the dataset was saved with an indices mapping; call"
    ):
        read_rows(folder)
    (folder / "state.json").write_text("[" * 10_000)
    with pytest.raises(DataError, match=r"state\.json: not written by `save_to_disk` \("):
        read_rows(folder)


def test_decimal_numbers_of_parquet_are_numbers(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"text": ["a", "b"], "score": [Decimal("4.50"), Decimal("3.00")]}),
        tmp_path / "x.parquet",
    )
    assert read_rows(tmp_path / "x.parquet").records == [
        {"text": "a", "score": 4.5},
        {"text": "b", "score": 3.0},
    ]


def test_a_damaged_arrow_file_is_refused(saved: Any) -> None:
    path = saved("file")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"arrow:1:1: not an Arrow file \("):
        read_rows(path)


@pytest.mark.parametrize(
    ("names", "outer", "inner", "one"),
    [
        (
            (
                "train/en/pos/1.txt",
                "train/en/neg/1.txt",
                "train/de/pos/1.txt",
                "train/de/neg/1.txt",
            ),
            "de, en",
            "neg, pos",
            "train/de",
        ),
        (("a/x/1.txt", "a/y/1.txt", "b/x/1.txt", "b/y/1.txt", "b/z/1.txt"), "a, b", "x, y", "a"),
        (
            ("all/a/train/x/1", "all/a/train/y/1", "all/b/train/x/1", "all/b/train/y/1"),
            "a, b",
            "x, y",
            "all/a/train",
        ),
    ],
)
def test_two_levels_of_folders_that_could_be_labels_are_refused(
    tmp_path: Path, names: tuple[str, ...], outer: str, inner: str, one: str
) -> None:
    make(tmp_path, *names)
    with pytest.raises(DataError) as caught:
        read_rows(tmp_path)
    assert (
        str(caught.value)
        == f"{tmp_path}: the labels could be the subfolders {outer}, or {inner} inside them;"
        f" keep one level of folders, or use one of them, such as {tmp_path / one}"
    )
    assert {label for _, label in labels(tmp_path / one)} == set(inner.split(", "))


def test_parts_inside_of_labels_are_no_labels(tmp_path: Path) -> None:
    make(tmp_path, "pos/part/1.txt", "pos/a/1.txt", "neg/part/1.txt", "neg/2.txt")
    assert {label for _, label in labels(tmp_path)} == {"neg", "pos"}


def test_a_label_that_is_called_as_a_split_is_told(tmp_path: Path) -> None:
    make(tmp_path, "dev/1.txt", "ops/1.txt")
    with pytest.raises(
        DataError, match="or if the folder 'dev' is a label, rename it, such as to 'label_dev'"
    ):
        read_rows(tmp_path)
    (tmp_path / "dev").rename(tmp_path / "label_dev")
    assert {label for _, label in labels(tmp_path)} == {"label_dev", "ops"}
