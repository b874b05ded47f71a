"""Sources of a config: labels are those of all of them, whatever their columns are called."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.config.schema import Config
from jaxpeft.data.examples.reading import read_examples
from jaxpeft.errors import DataError
from tests.train.runs import make_config, tiny_models

__all__ = ["make_config", "tiny_models"]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    "names", [("text", "label"), ("sentence", "intent")], ids=["the same columns", "others"]
)
def test_labels_are_those_of_all_sources(
    make_config: Callable[..., Config], tmp_path: Path, names: tuple[str, str]
) -> None:
    first = write(tmp_path / "a.jsonl", [{"text": f"word{i}", "label": "red"} for i in range(10)])
    other = write(
        tmp_path / "b.jsonl", [{names[0]: f"word{i}", names[1]: "blue"} for i in range(10, 20)]
    )
    config = make_config(data__train=(first, other), data__validation_share=0.2)
    train, validation, _ = read_examples(config)
    assert train.label_names == validation.label_names == ("blue", "red")
    assert (len(train), len(validation)) == (16, 4)
    told = dict(zip(train.texts, train.labels.tolist(), strict=True))  # type: ignore[union-attr]
    assert all(label == (int(text.removeprefix("word")) < 10) for text, label in told.items())


def names(folder: Path, *words: str) -> Path:
    """Write a text for each word in the folder's sub-folders `pos` and `neg`."""
    for label in ("pos", "neg"):
        (folder / label).mkdir(parents=True)
        for word in words:
            (folder / label / f"{word}.txt").write_text(word)
    return folder


@pytest.mark.parametrize("given", ["aclImdb", "aclImdb/train"])
def test_test_rows_in_the_folder_or_beside_it_are_taken_and_told(
    make_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture, given: str
) -> None:
    names(tmp_path / "aclImdb" / "train", *(f"word{i}" for i in range(5)))
    names(tmp_path / "aclImdb" / "test", "word8", "word9")
    config = make_config(data__train=str(tmp_path / given))
    with caplog.at_level("INFO", logger="jaxpeft"):
        train, validation, test = read_examples(config)
    assert (len(train), len(validation), sorted(test.texts)) == (
        8,
        2,
        ["word8", "word8", "word9", "word9"],
    )
    assert train.label_names == test.label_names == ("neg", "pos")
    assert ": using its test rows for the final figures" in caplog.text
    named = make_config(
        data__train=str(tmp_path / given), data__test=str(tmp_path / "aclImdb" / "train")
    )
    assert len(read_examples(named)[2]) == 10


def test_test_rows_that_are_found_and_have_no_labels_are_refused_with_a_way_out(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    train = write(
        tmp_path / "train.jsonl", [{"text": f"word{i}", "label": str(i % 2)} for i in range(10)]
    )
    write(tmp_path / "test.jsonl", [{"id": 1, "text": "word1"}])
    with pytest.raises(DataError) as caught:
        read_examples(make_config(data__train=str(tmp_path)))
    assert str(caught.value).endswith(
        f"\n{tmp_path}: its test rows are used because data.test is not set; set data.test, or name a"
        " file in data.train"
    )
    _, validation, test = read_examples(make_config(data__train=train))
    assert test is validation


def test_validation_rows_that_are_not_used_are_told(
    make_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("train", "dev"):
        write(
            tmp_path / f"{name}.jsonl",
            [{"text": f"word{i}", "label": str(i % 2)} for i in range(10)],
        )
    with caplog.at_level("INFO", logger="jaxpeft"):
        _, validation, test = read_examples(make_config(data__train=str(tmp_path)))
    assert test is validation
    assert (
        f"ignoring its validation rows; set data.validation={tmp_path} to use them" in caplog.text
    )


def test_rows_are_drawn_for_training_and_never_of_those_to_judge_by(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    files = {
        f"data__{split}": write(
            tmp_path / f"{split}.jsonl",
            [{"text": f"word{i}", "label": str(i % 2)} for i in range(9)],
        )
        for split in ("train", "validation", "test")
    }
    assert [len(part) for part in read_examples(make_config(**files, data__max_rows=4))] == [
        4,
        9,
        9,
    ]


def test_what_is_said_of_files_is_said_to_all_splits(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    files = {}
    for split in ("train", "validation", "test"):
        path = tmp_path / f"{split}.csv"
        path.write_bytes(
            "\n".join(f"{i % 2}~{split} \u201cword{i}\u201d" for i in range(6)).encode("cp1252")
        )
        files[f"data__{split}"] = str(path)
    columns = {"text": "2", "label": "1"}
    config = make_config(
        **files,
        data__encoding="cp1252",
        data__delimiter="~",
        data__header=False,
        data__columns=columns,
    )
    for split, examples in zip(("train", "validation", "test"), read_examples(config), strict=True):
        assert examples.texts == [f"{split} \u201cword{i}\u201d" for i in range(6)]
        assert examples.label_names == ("0", "1")


def test_a_dotted_column_is_a_value_inside(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = [{"review": {"body": f"word{i}"}, "meta": {"stars": i % 2}} for i in range(10)]
    columns = {"text": "review.body", "label": "meta.stars"}
    train, _, _ = read_examples(
        make_config(data__train=write(tmp_path / "a.jsonl", rows), data__columns=columns)
    )
    assert train.label_names == ("0", "1")
    assert set(train.texts) <= {f"word{i}" for i in range(10)}


def test_columns_that_nothing_reads_are_told_once(
    make_config: Callable[..., Config], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"text": f"word{i}", "label": "ab"[i % 2], "title": "word1", "empty": None, "id": i}
        for i in range(20)
    ]
    file = write(tmp_path / "a.jsonl", rows)
    read_examples(make_config(data__train=file, data__validation=file, data__test=file))
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    wanted = "columns used: 'text' (text), 'label' (label); unused: 'title' (perhaps a second text), 'id'"
    assert told == [f"{file}: {wanted}"]


def test_rows_with_more_than_would_be_learned_need_a_word(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "word1 word2", "code": "word3"}] * 12)
    with pytest.raises(DataError, match=r"without 'code' \(perhaps the answer\)"):
        read_examples(make_config("text", data__train=file))
    assert (
        read_examples(make_config("text", data__train=file, data__format="text"))[0].kind == "text"
    )
    named = make_config(
        "text", data__train=file, data__columns={"prompt": "text", "completion": "code"}
    )
    assert read_examples(named)[0].kind == "prompt_completion"


def test_rows_without_a_label_are_in_no_split(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    labels = ["yes", "no", "-", "yes"]
    file = write(
        tmp_path / "a.jsonl", [{"text": f"word{i}", "label": labels[i % 4]} for i in range(40)]
    )
    with pytest.raises(DataError, match=r"'-' .*set data.unlabeled="):
        read_examples(make_config(data__train=file))
    train, validation, _ = read_examples(make_config(data__train=file, data__unlabeled=("-",)))
    assert (train.label_names, len(train) + len(validation)) == (("no", "yes"), 30)
