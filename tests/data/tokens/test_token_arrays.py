"""The cache of tokens: hit, miss, damage, and a folder that cannot be written."""

from __future__ import annotations

import importlib
import logging
from pathlib import Path

import numpy as np
import pytest

from jaxpeft.data.tokens.encode import encode
from jaxpeft.data.tokens.token_arrays import cache_folder, load_arrays, save_arrays

FIELDS = ("tokens", "offsets", "labels", "type_ids", "source")


@pytest.fixture
def run(classified, bert, tmp_path, monkeypatch):
    """Encodes, and counts how often the tokenizer really ran."""
    calls = []
    module = importlib.import_module("jaxpeft.data.tokens.encode")
    real = module.tokenize
    monkeypatch.setattr(module, "tokenize", lambda *args: calls.append(1) or real(*args))

    def encode_it(text="a b c", **options):
        examples = classified((text, "x"), ("d e", "y"), ("f", "x"))
        made = encode(
            examples, bert, **{"max_length": 8, "vocab_size": 42, "cache_dir": tmp_path} | options
        )
        return made, len(calls)

    return encode_it


def same(a, b) -> bool:
    return (
        all(np.array_equal(getattr(a, f), getattr(b, f)) for f in FIELDS) and a.counts == b.counts
    )


def only_file(folder):
    (path,) = (folder / "encoded").iterdir()
    return path


def test_the_second_time_is_a_hit(run, tmp_path):
    first, _ = run()
    second, calls = run()
    assert (first.cache, second.cache, calls) == ("miss", "hit", 1)
    assert same(first, second)
    assert first.fingerprint == second.fingerprint
    assert only_file(tmp_path).name == f"{first.fingerprint}.npz"


@pytest.mark.parametrize("change", [{"text": "a b"}, {"max_length": 4}])
def test_other_data_or_options_are_a_miss(run, change):
    run()
    other, calls = run(**change)
    assert (other.cache, calls) == ("miss", 2)


def test_the_vocabulary_is_checked_on_a_hit_too(run):
    from jaxpeft.errors import DataError

    run()
    with pytest.raises(DataError, match="the model's 5, and the data contains token"):
        run(vocab_size=5)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: b"<html>" + data,
        lambda data: data[:-30] + b"\0" * 30,
        lambda data: b"\x80\x04N." + data,
    ],
    ids=["empty", "half", "html", "tail", "pickle"],
)
def test_a_damaged_file_is_built_again(run, tmp_path, damage, caplog):
    first, _ = run()
    path = only_file(tmp_path)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        again, calls = run()
    assert (again.cache, calls) == ("rebuilt", 2)
    assert same(first, again)
    assert f"{path}: the cached tokens are damaged" in caplog.text
    assert run()[0].cache == "hit"


def test_any_flipped_byte_is_found(run, tmp_path):
    run()
    path = only_file(tmp_path)
    good = path.read_bytes()
    assert load_arrays(path) is not None
    for i in range(0, len(good), 7):
        path.write_bytes(good[:i] + bytes([good[i] ^ 0x10]) + good[i + 1 :])
        assert load_arrays(path) is None, i


def test_the_cache_is_an_npz_that_anybody_can_open(run, tmp_path):
    made, _ = run()
    with np.load(only_file(tmp_path), allow_pickle=False) as file:
        assert np.array_equal(file["tokens"], made.tokens)


def test_no_half_written_file_is_left(tmp_path, monkeypatch, caplog):
    def fail(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    save_arrays(tmp_path / "x" / "key.npz", {"tokens": np.zeros(3, np.int32)})
    assert list((tmp_path / "x").iterdir()) == []
    assert "the tokens could not be cached" in caplog.text
    assert "No space left" in caplog.text


def test_a_cache_that_cannot_be_written_stops_nothing(run, tmp_path, caplog):
    (tmp_path / "encoded").write_text("a file where the folder should be")
    made, _ = run()
    assert made.cache == "miss"
    assert "the tokens could not be cached" in caplog.text


def test_the_cache_can_be_off(run, tmp_path):
    assert run(use_cache=False)[0].cache == "off"
    assert not (tmp_path / "encoded").exists()


def test_where_the_cache_is(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXPEFT_CACHE", str(tmp_path / "env"))
    assert cache_folder(tmp_path) == tmp_path / "encoded"
    assert cache_folder(None) == tmp_path / "env" / "encoded"
    monkeypatch.setenv("JAXPEFT_CACHE", "off")
    assert cache_folder(None) is None
    monkeypatch.delenv("JAXPEFT_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "jaxpeft" / "encoded"
