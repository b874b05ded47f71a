"""Reading rows: files, the package, the hub, and what is refused."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxpeft.data import rows as module
from jaxpeft.data.rows import read_rows
from jaxpeft.errors import DataError


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


def test_a_file_that_cannot_be_read_is_refused(write, monkeypatch):
    def fail(self):
        raise PermissionError(13, "Permission denied")

    path = write("x.csv", "a\n1\n")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert refusal(path) == f"{path}: cannot be read (Permission denied); check the path and its permissions"


def test_parquet_and_text_are_read(tmp_path, write):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"text": ["a", "b"], "label": [0.5, None]})
    pq.write_table(table, tmp_path / "x.parquet")
    assert read_rows(tmp_path / "x.parquet").records == [{"text": "a", "label": 0.5}, {"text": "b", "label": None}]
    assert read_rows(write("x.txt", "one\ntwo\n")).records == [{"text": "one\ntwo\n"}]
    assert refusal(write("y.parquet", "<html>")).startswith(f"{tmp_path}/y.parquet:1:1: not a parquet file (")


def test_a_missing_file_names_the_nearest(tmp_path, write):
    write("train.jsonl", "{}")
    path = str(tmp_path / "trian.jsonl")
    assert refusal(path) == f"{path}: no such file in {str(tmp_path)!r}; did you mean 'train.jsonl'?"
    gone = str(tmp_path / "nowhere" / "x.csv")
    assert refusal(gone) == f"{gone}: no such file, and no folder {str(tmp_path / 'nowhere')!r}; check the path"


def test_what_is_not_a_data_file_is_refused(tmp_path, write):
    (tmp_path / "empty").mkdir()
    assert refusal(tmp_path / "empty").startswith(
        f"{tmp_path}/empty: a folder without data files; give one with files of"
    )
    assert "files of the ending '.pkl' are not read; convert it to one of .jsonl, " in refusal(write("x.pkl", "x"))
    assert refusal(write("x.csv", "a\n1\n"), split="train", revision="v1").endswith(
        "x.csv: split, revision is for hub ids, this is a file; remove it"
    )


@pytest.mark.parametrize("path", ["package:../rows", "package:support_tickets", "package:a/b/c", "package:a/../b"])
def test_a_package_path_cannot_leave_its_folder(path):
    assert refusal(path).startswith(f"{path}: not of the form package:NAME/SPLIT")


def test_package_data_is_read_and_a_missing_split_names_the_others(tmp_path, monkeypatch):
    (tmp_path / "tickets").mkdir()
    (tmp_path / "tickets" / "train.jsonl").write_text('{"text": "a"}\n')
    monkeypatch.setattr(module.importlib.resources, "files", lambda name: {"jaxpeft.data": tmp_path}[name])
    assert read_rows("package:tickets/train").records == [{"text": "a"}]
    assert (
        refusal("package:tickets/tset")
        == "package:tickets/tset: no such data set in jaxpeft; there are package:tickets/train"
    )


def test_a_hub_id_is_loaded_with_names_for_class_labels(tmp_path, monkeypatch):
    import datasets

    labels = datasets.ClassLabel(names=["bad", "good"])
    features = {"text": datasets.Value("string"), "label": labels, "tags": datasets.Sequence(labels)}
    data = datasets.Dataset.from_dict(
        {"text": ["a", "b"], "label": [1, -1], "tags": [[0, 1], []]}, features=datasets.Features(features)
    )
    asked = {}

    def load_dataset(path, name, **options):
        asked.update(options, path=path, name=name)
        return data

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("org/name", split="test", config="mrpc", revision="abc")
    assert asked == {"path": "org/name", "name": "mrpc", "split": "test", "revision": "abc", "streaming": False}
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
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    assert refusal("org/name") == "org/name[train]: the split has no rows; choose another"


def test_a_hub_id_that_cannot_be_loaded_is_refused(tmp_path, monkeypatch):
    import datasets

    def load_dataset(*_, **__):
        raise ConnectionError("no network\nmore")

    (tmp_path / "tickets.csv").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    said = "tickets[train]: neither a file here nor loaded from the hub (no network); did you mean 'tickets.csv'?"
    assert refusal("tickets") == said


@pytest.mark.parametrize("path", ["data/train.jsonl", "train.csv", "here/name", "./org/name", "a/b/c"])
def test_what_can_only_be_a_file_is_never_looked_up_on_the_hub(tmp_path, monkeypatch, path):
    import datasets

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the hub was asked"))
    assert "no such file" in refusal(path)


def test_the_package_imports_neither_jax_nor_the_heavy_libraries():
    code = "import sys, jaxpeft.data.rows; print(sorted({'datasets', 'transformers', 'pyarrow'} & set(sys.modules)))"
    root = Path(module.__file__).parents[2]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    for file in Path(module.__file__).parent.glob("*.py"):
        assert "import jax\n" not in file.read_text(), file
        assert "jax.numpy" not in file.read_text(), file
