"""Reading rows: files, the package, the hub, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.data.rows import read as module
from jaxpeft.data.rows.folders import files_of
from jaxpeft.data.rows.read import Rows, read_rows
from jaxpeft.errors import DataError
from tests.conftest import ROOT


def refusal(path, **options) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(path, **options)
    return str(caught.value)


def test_rows_carry_name_hash_lines_and_columns(write):
    content = '{"a": 1}\n{"b": 2, "a": 3}\n'
    path = write("x.jsonl", content)
    rows = read_rows(path)
    assert (rows.name, rows.sha256) == (path, hashlib.sha256(content.encode()).hexdigest())
    assert (len(rows), rows.columns(), rows.where(1)) == (2, ["a", "b"], f"{path}:2:1 (row 2)")
    assert read_rows(Path(path)) == rows


def test_some_rows_keep_their_lines_and_have_a_hash_of_their_own(write):
    rows = read_rows(write("x.csv", "a\n1\n2\n3\n"))
    some = rows.take([2, 0])
    assert (some.records, some.lines, some.name) == ([{"a": "3"}, {"a": "1"}], (4, 2), rows.name)
    assert len({rows.sha256, some.sha256, rows.take([0, 2]).sha256}) == 3
    assert rows.take([2, 0]) == some


def test_some_rows_keep_the_places_that_they_had_among_all(write):
    one, two = (
        read_rows(write("1.csv", "a\n1\n2\n")),
        read_rows(write("2.jsonl", '{"a": 3}\n{"a": 4}\n')),
    )
    some = Rows.join([one.take([1]), two], "both").take([2, 0]).take([1, 0])
    assert [some.where(i) for i in (0, 1)] == [f"{one.name}:3:1 (row 2)", f"{two.name}:2:1 (row 2)"]


def test_joined_rows_keep_their_places_and_have_a_hash_of_their_own(write):
    one, two = read_rows(write("1.csv", "a\n1\n2\n")), read_rows(write("2.json", '[{"b": 3}]'))
    both = Rows.join([one, two], "both")
    assert (both.name, both.records, both.columns()) == (
        "both",
        [*one.records, *two.records],
        ["a", "b"],
    )
    places = [f"{one.name}:2:1 (row 1)", f"{one.name}:3:1 (row 2)", f"{two.name} (row 1)"]
    assert [both.where(i) for i in range(3)] == places
    others = [Rows.join([two, one], "both"), Rows.join([one, two.take([0])], "both"), one, two]
    assert both.sha256 not in [rows.sha256 for rows in others]
    assert Rows.join([one, two], "both") == both


def test_one_part_joined_is_itself_by_another_name(write):
    rows = read_rows(write("1.csv", "a\n1\n"))
    joined = Rows.join([rows], "folder")
    assert (joined.name, joined.sha256, joined.where(0)) == (
        "folder",
        rows.sha256,
        f"{rows.name}:2:1 (row 1)",
    )


NAMED = [
    "train-00000-of-00002.parquet",
    "train-00001-of-00002.parquet",
    "validation.jsonl",
    "test_a.csv",
]


@pytest.mark.parametrize(
    ("names", "split", "chosen"),
    [
        (
            ["b.jsonl", "a.csv", "sub/c.tsv", "README.md", "LICENSE"],
            "train",
            ["a.csv", "b.jsonl", "sub/c.tsv"],
        ),
        (NAMED, "train", NAMED[:2]),
        (NAMED, "validation", NAMED[2:3]),
        (NAMED, "test", NAMED[3:]),
        (
            ["train/part1.csv", "train/test_case.csv", "test/part1.csv"],
            "train",
            ["train/part1.csv", "train/test_case.csv"],
        ),
        (["data/train-0.parquet", "data/test-0.parquet"], "train", ["data/train-0.parquet"]),
        (
            ["en/Train.JSONL", "de/train.jsonl", "de/dev.jsonl"],
            "train",
            ["de/train.jsonl", "en/Train.JSONL"],
        ),
        (["training.csv", "val.csv"], "train", ["training.csv"]),
        (["train.csv", "val.csv"], "validation", ["val.csv"]),
        (["train.csv", "dev.csv"], "validation", ["dev.csv"]),
        (["train.csv", "valid1.csv"], "validation", ["valid1.csv"]),
        (["train.csv", "eval.csv"], "validation", ["eval.csv"]),
        (["trainers.csv", "tests.csv"], "train", ["tests.csv", "trainers.csv"]),
        (
            [".hidden.csv", ".git/x.csv", "dataset_info.json", "dataset_infos.json", "a.csv"],
            "train",
            ["a.csv"],
        ),
    ],
)
def test_the_files_of_a_folder_are_those_of_its_split(tmp_path, names, split, chosen):
    folder = tmp_path / ".hidden" / "train"  # what is above the folder says nothing of its files
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (folder / "folder.csv").mkdir()
    assert [str(path.relative_to(folder)) for path in files_of(folder, split).paths] == chosen


def test_a_folder_without_the_split_or_without_files_is_refused(tmp_path):
    for name in ("test.csv", "dev.csv", "other.csv"):
        (tmp_path / name).write_text("a\n1\n")
    assert (
        refusal(tmp_path)
        == f"{tmp_path}: no data file is named after the split 'train' (splits found: test, validation);"
        " give the path of a file"
    )
    assert (
        refusal(tmp_path, split="test", revision="v1", config="x")
        == f"{tmp_path}: config, revision is for hub ids, but this is a folder; remove it"
    )
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "dataset_info.json").write_text("{}")
    (tmp_path / "only" / "README.md").write_text("# Data")
    assert refusal(tmp_path / "only").startswith(
        f"{tmp_path}/only: the folder has no data files; supported are"
    )


def test_a_folder_is_read_whole_each_row_with_its_file(tmp_path, write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    write("a.jsonl", '{"text": "1"}\n{"text": "2"}\n')
    write("b.csv", "text,label\n3,x\n")
    pq.write_table(pa.table({"text": ["4"]}), tmp_path / "c.parquet")
    write("README.md", "no rows")
    rows = read_rows(tmp_path)
    assert rows.records == [
        {"text": "1"},
        {"text": "2"},
        {"text": "3", "label": "x"},
        {"text": "4"},
    ]
    assert rows.name == str(tmp_path)
    places = [
        f"{tmp_path}/a.jsonl:1:1 (row 1)",
        f"{tmp_path}/a.jsonl:2:1 (row 2)",
        f"{tmp_path}/b.csv:2:1 (row 1)",
        f"{tmp_path}/c.parquet (row 1)",
    ]
    assert [rows.where(i) for i in range(4)] == places
    before = rows.sha256
    write("b.csv", "text,label\n3,y\n")
    assert read_rows(tmp_path).sha256 != before
    write("d.jsonl", "{")
    assert refusal(tmp_path).startswith(f"{tmp_path}/d.jsonl:1:2: not JSON")


def test_a_file_that_cannot_be_read_is_refused(write, monkeypatch):
    def fail(self, mode):
        raise PermissionError(13, "Permission denied")

    path = write("x.csv", "a\n1\n")
    monkeypatch.setattr(Path, "open", fail)
    assert (
        refusal(path)
        == f"{path}: cannot be read (Permission denied); check the path and its permissions"
    )


def test_parquet_and_text_are_read(tmp_path, write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"], "label": [0.5, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet").records == [
        {"text": "a", "label": 0.5},
        {"text": "b", "label": None},
    ]
    assert read_rows(write("x.txt", "one\ntwo\n")).records == [{"text": "one\ntwo\n"}]
    assert refusal(write("y.parquet", "<html>")).startswith(
        f"{tmp_path}/y.parquet:1:1: not a parquet file ("
    )


def test_a_missing_file_names_the_nearest(tmp_path, write):
    write("train.jsonl", "{}")
    path = str(tmp_path / "trian.jsonl")
    assert (
        refusal(path) == f"{path}: no such file in {str(tmp_path)!r}; did you mean 'train.jsonl'?"
    )
    gone = str(tmp_path / "nowhere" / "x.csv")
    assert (
        refusal(gone)
        == f"{gone}: no such file, and no folder {str(tmp_path / 'nowhere')!r}; check the path"
    )


def test_what_is_not_a_data_file_is_refused(tmp_path, write):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(
        f"{tmp_path}/empty: the folder has no data files; supported are"
    )
    assert (
        "the extension '.pkl' is not supported; it may contain code; write its rows as JSONL"
        in refusal(write("x.pkl", "x"))
    )
    assert refusal(write("x.csv", "a\n1\n"), split="train", revision="v1").endswith(
        "x.csv: split, revision is for hub ids, but this is a file; remove it"
    )


@pytest.mark.parametrize(
    "path", ["package:../rows", "package:support_tickets", "package:a/b/c", "package:a/../b"]
)
def test_a_package_path_cannot_leave_its_folder(path):
    assert refusal(path).startswith(f"{path}: not of the form package:NAME/SPLIT")


def test_package_data_is_read_and_a_missing_split_names_the_others(tmp_path, monkeypatch):
    (tmp_path / "tickets").mkdir()
    (tmp_path / "tickets" / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(
        module.importlib.resources, "files", lambda name: {"jaxpeft.data": tmp_path}[name]
    )
    assert read_rows("package:tickets/train").records == [{"text": "a"}]
    assert (
        refusal("package:tickets/tset")
        == "package:tickets/tset: no such dataset in jaxpeft; choose from package:tickets/train"
    )


def test_a_hub_id_is_loaded_with_names_for_class_labels(tmp_path, monkeypatch):
    import datasets

    labels = datasets.ClassLabel(names=["bad", "good"])
    features = {
        "text": datasets.Value("string"),
        "label": labels,
        "tags": datasets.Sequence(labels),
    }
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]},
        features=datasets.Features(features),
    )
    asked = {}

    def load_dataset(path, name, **options):
        asked.update(options, path=path, name=name)
        return data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("org/name", split="test", config="mrpc", revision="abc")
    assert asked == {
        "path": "org/name",
        "name": "mrpc",
        "split": "test",
        "revision": "abc",
        "streaming": False,
    }
    assert rows.records == [
        {"text": "a", "label": "good", "tags": ["bad", "good"]},
        {"text": "b", "label": None, "tags": []},
    ]
    assert rows.name == "org/name[mrpc:test]"
    assert rows.sha256 == read_rows("org/name", split="test", config="mrpc").sha256
    assert asked["revision"] is None


def test_a_hub_split_without_rows_is_refused(tmp_path, monkeypatch):
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []})
    )
    assert refusal("org/name") == "org/name[train]: the split has no rows; choose another"


def test_a_hub_id_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network\nmore")

    (tmp_path / "tickets.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = (
        "tickets[train]: not a local file, and cannot be loaded from the hub (no network); did you mean"
        " 'tickets.csv'?"
    )
    assert refusal("tickets") == said


@pytest.mark.parametrize(
    "path", ["data/train.jsonl", "train.csv", "here/name", "./org/name", "a/b/c"]
)
def test_what_can_only_be_a_file_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, path):
    import datasets

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert "no such file" in refusal(path)


def test_the_package_imports_neither_jax_nor_the_heavy_libraries():
    code = (
        "import sys, jaxpeft.data.rows.read; print(sorted({'datasets', 'transformers', 'pyarrow'} &"
        " set(sys.modules)))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
    for file in (ROOT / "jaxpeft" / "data").rglob("*.py"):
        assert "import jax\n" not in file.read_text(), file
        assert "jax.numpy" not in file.read_text(), file
