"""Data files on disk: regular ones only, packed ones too, and never more of them than is
allowed.
"""

from __future__ import annotations

import gzip
import os
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.data.rows.file_options import FileOptions
from jaxpeft.data.rows.read import read_rows
from jaxpeft.data.rows.row_streams import RowStream
from jaxpeft.errors import DataError

MIB = 1 << 20


def refusal(path: Any, read: Any = read_rows) -> str:
    with pytest.raises(DataError) as caught:
        read(path)
    return str(caught.value)


def stream(path: Any) -> Any:
    return RowStream(str(path), "train").rows(0, 9)


@pytest.mark.parametrize("read", [read_rows, stream])
def test_what_is_no_regular_file_is_refused_before_it_is_opened(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    assert (
        refusal(tmp_path / "x.jsonl", read)
        == f"{tmp_path}/x.jsonl: a named pipe, not a regular file; write its rows to a file, and"
        " use that"
    )
    (tmp_path / "y.csv").symlink_to("/dev/zero")
    assert "y.csv: a device, not a regular file" in refusal(tmp_path / "y.csv", read)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv.gz", "text,label\na,x\n"),
        ("X.TSV.GZ", "text\tlabel\na\tx\n"),
        ("x.jsonl.gz", '{"text": "a", "label": "x"}\n'),
        ("x.json.gz", '[{"text": "a", "label": "x"}]'),
    ],
)
def test_a_gzip_file_is_read_as_what_is_inside(write: Any, name: str, content: str) -> None:
    assert read_rows(write(name, gzip.compress(content.encode()))).records == [
        {"text": "a", "label": "x"}
    ]


@pytest.mark.parametrize("read", [read_rows, stream])
def test_a_gzip_file_that_is_broken_is_refused(write: Any, read: Any) -> None:
    packed = gzip.compress(b"text,label\n" + b"a,x\n" * 1000)
    assert "not an intact gzip file (" in refusal(write("x.csv.gz", packed[:-20]), read)
    assert "not an intact gzip file (Not a gzipped file" in refusal(
        write("x.csv.gz", "text\na\n"), read
    )


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("x.zip", "unpack it first; the only supported compression is .gz"),
        ("x.tar.gz", "name it by what is inside, such as rows.csv.gz"),
        ("x.gz", "name it by what is inside, such as rows.csv.gz"),
        ("x.xlsx", "save it as CSV (UTF-8)"),
        ("x.dat", "rename it to match its format, or convert it to one of .jsonl, "),
    ],
)
def test_other_endings_are_refused_with_a_way_out(write: Any, name: str, fix: str) -> None:
    said = refusal(write(name, "x"))
    assert f"the extension '.{name.rpartition('.')[2]}' is not supported; {fix}" in said


def parquet_of_one_value(path: Path, dictionary: bool) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(
        pa.table({"text": ["x" * 1000] * 20_000}),
        path,
        use_dictionary=dictionary,
        compression="zstd",
    )


@pytest.mark.parametrize(
    "name", ["x.jsonl", "x.jsonl.gz", "plain.parquet", "dictionary.parquet", "x.arrow", "folder"]
)
def test_what_unpacks_to_more_than_is_allowed_is_refused_before_it_is_held(
    tmp_path: Path, name: str
) -> None:
    import pyarrow as pa

    path, row = tmp_path / name, b'{"text": "' + b"x" * 1000 + b'"}\n'
    if name == "folder":
        path.mkdir()
        for i in range(20):
            (path / f"{i}.jsonl").write_bytes(row * 1000)
    elif path.suffix == ".parquet":
        parquet_of_one_value(path, name.startswith("dictionary"))
        assert path.stat().st_size < MIB
    elif path.suffix == ".arrow":
        table = pa.table({"text": ["x" * 1000] * 20_000})
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=100)
    else:
        path.write_bytes(gzip.compress(row * 20_000) if path.suffix == ".gz" else row * 20_000)
    with pytest.raises(DataError) as caught:
        read_rows(path, file_options=FileOptions(most=10 * MIB))
    assert ": this source is larger than 0.00977 GiB unpacked; " in str(caught.value)
    assert (
        "set data.streaming to stream the training rows, or increase data.most_gib if memory"
        " allows" in str(caught.value)
    )
    assert len(read_rows(path, file_options=FileOptions(most=42 * MIB))) == 20_000
    assert len(stream(path)) == 9
