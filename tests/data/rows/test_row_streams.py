"""Rows read in order: the very rows that are read whole, from any row on, with their places and
refusals.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.data.rows import row_streams
from jaxpeft.data.rows.read import read_rows
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.errors import DataError

TEXTS = ["a", 'say "b"', "two\nlines, ü", "d  ", "e", "f", "g"]
RECORDS = [{"text": text, "label": str(i)} for i, text in enumerate(TEXTS)]
KINDS = ["x.jsonl", "x.csv", "x.tsv", "x.parquet", "folder", "org/name"]
Make = Callable[[str], str]


def write_file(path: Path, records: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records), path, row_group_size=2)
    else:
        text = io.StringIO(newline="")
        rows = csv.DictWriter(
            text, ["text", "label"], delimiter="\t" if path.suffix == ".tsv" else ","
        )
        rows.writeheader()
        rows.writerows(records)
        path.write_bytes(text.getvalue().encode())


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make a source of `RECORDS`: a file, a folder of four, or a hub data set."""

    def source(kind: str) -> str:
        if kind == "org/name":
            serve(monkeypatch)
            monkeypatch.chdir(tmp_path)
            return kind
        if kind == "folder":
            (tmp_path / kind / "train").mkdir(parents=True)
            parts = [("1.jsonl", 0, 3), ("2.csv", 3, 4), ("3.parquet", 4, 6), ("4.tsv", 6, 7)]
            for name, first, last in parts:
                write_file(tmp_path / kind / "train" / name, RECORDS[first:last])
            (tmp_path / kind / "test.jsonl").write_text('{"text": "not of this split"}\n')
        else:
            write_file(tmp_path / kind, RECORDS)
        return str(tmp_path / kind)

    return source


def serve(monkeypatch: pytest.MonkeyPatch, commit: str = "abc") -> None:
    """Answer as the hub would."""
    import datasets
    import huggingface_hub

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list("0123456"))}
    )
    values = {"text": TEXTS, "label": list(range(len(TEXTS)))}

    def load_dataset(
        path: str, name: str | None, *, split: str, revision: str | None, streaming: bool
    ) -> Any:
        assert (path, name, split, revision) == ("org/name", None, "train", None)
        data = datasets.Dataset.from_dict(values, features=features)
        return data.to_iterable_dataset() if streaming else data

    class Info:
        sha = commit

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_, **__: Info)


def taken(stream: RowStream, start: int, count: int) -> list[tuple[Any, str]]:
    rows = stream.rows(start, count)
    return [(record, rows.where(i)) for i, record in enumerate(rows.records)]


def refusal(path: str, start: int = 0, count: int = 99) -> str:
    with pytest.raises(DataError) as caught:
        RowStream(path, "train").rows(start, count)
    return str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_any_rows_are_those_that_are_read_whole(make: Make, kind: str) -> None:
    path = make(kind)
    whole = read_rows(path)
    wanted = [(record, whole.where(i)) for i, record in enumerate(whole.records)]
    assert [record for record, _ in wanted] == RECORDS
    stream = RowStream(path, "train")
    for start in range(9):  # on from the last call, and back: the last call went to the end
        for count in range(9):
            assert taken(stream, start, count) == taken(RowStream(path, "train"), start, count)
            assert taken(stream, start, count) == wanted[start : start + count]
    assert stream.rows(0, 1).name == path
    forward = [taken(stream, start, 2) for start in (0, 2, 6, 8, 20, 4)]
    assert forward == [wanted[start : start + 2] for start in (0, 2, 6, 8, 20, 4)]


def test_reading_on_does_not_begin_anew(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = make("x.jsonl"), list[str]()
    original = row_streams._Jsonl.raw
    monkeypatch.setattr(
        row_streams._Jsonl, "raw", lambda self: opened.append(self.name) or original(self)
    )
    stream = RowStream(path, "train")
    for start in (0, 2, 5, 7, 9):
        stream.rows(start, 2)
    assert opened == [path]
    stream.rows(1, 1)
    assert opened == [path] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_is_sent_to_another_process_in_the_middle(make: Make, kind: str) -> None:
    stream = RowStream(make(kind), "train")
    wanted = taken(stream, 2, 3)
    sent = pickle.loads(pickle.dumps(stream))
    assert taken(sent, 2, 3) == wanted
    assert sent.identity() == stream.identity()
    assert taken(stream, 5, 9) == taken(sent, 5, 9)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("bom.jsonl", '\ufeff{"text": "a"}\n{"text": "b"}\n'),
        ("crlf.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n'),
        ("blank.jsonl", '{"text": "a"}\n{"text": "b"}\n\n \n\r\n\n'),
        ("cut.jsonl", '{"text": "a"}\n{"text": "b"}'),
        ("bom.csv", "\ufefftext\na\nb\n"),
        ("crlf.csv", "text\r\na\r\nb\r\n"),
        ("mac.csv", "text\ra\rb\r"),
        ("blank.csv", "text\na\nb\n\n\r\n\n"),
        ("cut.csv", "text\na\nb"),
        ("blank.tsv", "text\na\nb\n\n"),
        ("wide.csv", "text\na\nb\n".encode("utf-16")),
        ("wide.tsv", "text\r\na\r\nb\r\n".encode("utf-16-le")),
        ("wide.jsonl", '{"text": "a"}\r\n{"text": "b"}\r\n'.encode("utf-32")),
        ("packed.csv.gz", gzip.compress(b"text\na\nb\n", mtime=0)),
        ("packed.jsonl.gz", gzip.compress(b'{"text": "a"}\n{"text": "b"}\n', mtime=0)),
    ],
)
def test_marks_line_ends_and_blank_last_lines_are_no_rows(
    write: Any, name: str, content: str
) -> None:
    path = write(name, content)
    whole = read_rows(path)
    assert whole.records == [{"text": "a"}, {"text": "b"}]
    stream = RowStream(path, "train").rows(0, 9)
    assert (stream.records, stream.lines) == (whole.records, whole.lines)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": 2,}\n{"a": 3}\n'),
        ("x.jsonl", b'{"a": 1}\n\n{"a": 3}\n'),
        ("x.jsonl", b'{"a": 1}\n[2]\n'),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n'),
        ("x.jsonl", b"\n \n{}\n"),
        ("x.csv", b"a,b\n1,2\n3\n"),
        ("x.csv", b"a,b\n1,2\n\n3,4\n"),
        ("x.csv", b'a\n"1\n'),
        ("x.csv", b"a,a\n1,2\n"),
        ("x.csv", b"\na\n1\n"),
        ("x.tsv", b"a\tb\n1\n"),
        ("x.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("x.csv", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("x.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
        ("x.jsonl", '{"a": 1}\n'.encode("utf-16")[:-1]),
        ("x.csv", "a\n1\n".encode("utf-16")[:-1]),
        ("x.parquet", b"PAR1 and nothing more"),
    ],
)
def test_what_is_broken_is_refused_in_the_same_words_with_its_place(
    write: Any, name: str, content: bytes
) -> None:
    path = write(name, content)
    with pytest.raises(DataError) as caught:
        read_rows(path)
    said = refusal(path)
    assert said == str(caught.value)
    assert said.startswith(f"{path}:")


@pytest.mark.parametrize("lines", [2, 20_000], ids=["at once", "further on"])
def test_a_byte_that_is_no_utf8_is_found_in_a_csv(write: Any, lines: int) -> None:
    path = write("x.csv", b"a,b\n" + b"1,2\n" * lines + b"3,\xff\n")
    said = refusal(path, lines, 9)
    assert said.startswith(f"{path}:{lines + 2}:3: not UTF-8 (byte 0xff); set data.encoding")


def test_a_broken_row_is_refused_only_where_it_is_read_and_each_time(write: Any) -> None:
    stream = RowStream(write("x.jsonl", '{"a": 1}\n{"a": 2}\n{"a": \n{"a": 4}\n'), "train")
    assert len(stream.rows(0, 2)) == 2
    for _ in range(2):
        with pytest.raises(DataError, match=r"x\.jsonl:3:7: not JSON \(Expecting value\)"):
            stream.rows(2, 2)
    assert stream.rows(3, 2).records == [{"a": 4}]


def test_a_damaged_file_of_a_folder_is_refused_each_time(write: Any, tmp_path: Path) -> None:
    write("a.jsonl", '{"a": 1}\n')
    write("b.parquet", "damaged")
    write("c.jsonl", '{"a": 3}\n')
    stream = RowStream(str(tmp_path), "train")
    assert len(stream.rows(0, 1)) == 1
    for _ in range(2):
        with pytest.raises(DataError, match=r"b\.parquet:1:1: not a parquet file"):
            stream.rows(1, 1)


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "header.csv"])
def test_an_empty_file_has_no_rows(write: Any, name: str) -> None:
    stream = RowStream(write(name, "a,b\n" if name == "header.csv" else ""), "train")
    assert (len(stream.rows(0, 9)), len(stream.rows(5, 9))) == (0, 0)


@pytest.mark.parametrize("ending", [".json", ".txt", ".gz"])
def test_other_files_are_refused_with_what_to_do(write: Any, ending: str) -> None:
    path = write(f"x{ending}", "[]")
    assert (
        refusal(path)
        == f"{path}: files with the extension {ending!r} cannot be streamed; convert it to .jsonl, one"
        " row per line"
    )


def test_what_is_not_there_or_may_not_be_read_is_refused(
    write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("train.jsonl", "{}")
    assert "no such file" in refusal(str(tmp_path / "trian.jsonl"))
    assert refusal(str(tmp_path / "trian.jsonl")).endswith("; did you mean 'train.jsonl'?")

    def fail(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", fail)
    assert (
        refusal(path)
        == f"{path}: cannot be read (Permission denied); check the path and its permissions"
    )


@pytest.mark.parametrize("change", ["head", "tail", "size", "none"])
@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".parquet"])
def test_the_identity_follows_head_tail_and_size_of_a_file(
    write: Any, monkeypatch: pytest.MonkeyPatch, ending: str, change: str
) -> None:
    monkeypatch.setattr(row_streams, "_EDGE", 4)
    content = bytearray(b"abcdefghijklmnop")
    before = RowStream(write(f"x{ending}", bytes(content)), "train").identity()
    if change == "size":
        content[8:8] = b"_"
    else:
        content[{"head": 0, "tail": -1, "none": 8}[change]] = ord("_")
    after = RowStream(write(f"x{ending}", bytes(content)), "train").identity()
    assert (before == after) == (change == "none")


def test_the_identity_follows_the_files_of_a_folder_and_their_order(
    write: Any, tmp_path: Path
) -> None:
    write("a.jsonl", '{"a": 1}\n')
    write("b.jsonl", '{"a": 2}\n')
    seen = {RowStream(str(tmp_path), "train").identity()}
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    seen.add(RowStream(str(tmp_path), "train").identity())
    (tmp_path / "c.jsonl").unlink()
    seen.add(RowStream(str(tmp_path), "train").identity())
    assert len(seen) == 3


def test_the_identity_is_looked_up_once_and_is_that_of_the_hub_s_commit(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = RowStream(make("org/name"), "train")
    first = stream.identity()
    serve(monkeypatch, "def")
    assert stream.identity() == pickle.loads(pickle.dumps(stream)).identity() == first
    assert RowStream("org/name", "train").identity() != first


def test_a_hub_that_fails_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    stream = RowStream(make("org/name"), "train")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(
        DataError,
        match=(
            r"^org/name: its revision cannot be determined \(ConnectionError\); check the network$"
        ),
    ):
        stream.identity()

    def rows() -> Any:
        yield {"text": "a"}
        raise ConnectionError("no route")

    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows)
    )
    with pytest.raises(
        DataError,
        match=r"^org/name\[train\]: reading stopped before the end \(no route\); check the network",
    ):
        RowStream("org/name", "train").rows(0, 9)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        DataError,
        match=r"^org/name\[train\]: not a local file, and cannot be loaded from the hub \(no route\)",
    ):
        RowStream("org/name", "train").rows(0, 9)
