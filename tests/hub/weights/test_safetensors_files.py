from __future__ import annotations

import io
import pickle
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from jaxpeft.errors import WeightsError
from jaxpeft.hub.weights.safetensors_files import (
    INDEX,
    SINGLE,
    Tensor,
    aligned_empty,
    open_folder,
    read_header,
)
from tests.hub.helpers import entry, write_raw

# What a hostile file would do when it is unpickled; with the guard, the test fails before it could.
PICKLE = pickle.dumps({"weight": np.zeros(2)}, protocol=2)


@pytest.fixture(autouse=True)
def guard(no_unpickling):
    """No test of this file may unpickle anything."""


def problems(folder):
    with pytest.raises(WeightsError) as caught:
        open_folder(folder)
    return caught.value.problems


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize(
    "dtype",
    [
        "float64",
        "float32",
        "float16",
        "bfloat16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "bool",
    ]
    + ["float8_e4m3fn", "float8_e5m2"],
)
def test_every_dtype_reads_bit_equal(tmp_path, dtype):
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    wanted = {
        "a": rng.integers(0, 2, (5, 3, 2)).astype(kind),
        "b": rng.integers(0, 2, (7,)).astype(kind),
    }
    save_file(wanted, tmp_path / SINGLE)
    found = open_folder(tmp_path)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert (found[name].dtype, found[name].shape, found[name].nbytes) == (
            kind,
            array.shape,
            array.nbytes,
        )
        assert found[name].read_rows(0, len(array)).tobytes() == array.tobytes()
        assert found[name].read_rows(1, 3).tobytes() == array[1:3].tobytes()
        assert found[name].read_rows(2, 2).shape == (0, *array.shape[1:])


def test_scalars_and_empty_tensors_are_read(tmp_path):
    save_file(
        {"s": np.full((), 3.5, np.float32), "e": np.zeros((0, 4), np.float32)}, tmp_path / SINGLE
    )
    found = open_folder(tmp_path)
    assert found["s"].read_rows(0, 1) == np.float32(3.5)
    assert (found["e"].nbytes, found["e"].read_rows(0, 0).shape) == (0, (0, 4))


def test_the_metadata_is_no_tensor(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / SINGLE, metadata={"format": "pt"})
    assert list(open_folder(tmp_path)) == ["a"]


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1000,)])
def test_arrays_are_aligned_for_jax(shape):
    made = aligned_empty(shape, np.dtype(np.float32))
    assert made.shape == shape and made.flags.c_contiguous and made.flags.writeable
    assert made.ctypes.data % 64 == 0 or made.size == 0


def test_a_file_that_shrinks_after_its_header_was_read_is_refused(tmp_path):
    save_file({"a": np.ones((4, 8), np.float32)}, tmp_path / SINGLE)
    tensor = open_folder(tmp_path)["a"]
    with (tmp_path / SINGLE).open("r+b") as file:
        file.truncate(tensor.offset + 100)
    assert tensor.read_rows(0, 3).sum() == 24
    with pytest.raises(
        WeightsError, match=rf"ends at byte {tensor.offset + 100}, inside a tensor; fetch it again"
    ):
        tensor.read_rows(0, 4)


def test_a_tensor_says_its_size_without_overflow(tmp_path):
    big = Tensor(tmp_path, 0, (2**20, 2**20, 2**10), np.dtype(np.float32))
    assert big.nbytes == 2**52


# -------------------------------------------------------------------------- what is not safetensors


def _zip():
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", PICKLE)
    return out.getvalue()


IMPOSTORS = {
    "LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 133466304\n",
        r"a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "HTML": (
        b"\n<!DOCTYPE html>\n<html><body>403</body></html>",
        r"an HTML or XML page, not the weights",
    ),
    "XML": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        r"an HTML or XML page",
    ),
    "pickle": (
        PICKLE,
        r"a pickle or zip file under another name; pickles can run code and are never read",
    ),
    "torch zip": (_zip(), r"a pickle or zip file under another name"),
    "old pickle": (
        pickle.dumps([1.5] * 9, protocol=0),
        r"not safetensors, or truncated \(\d+ bytes\); fetch it again",
    ),
    "empty": (b"", r"not safetensors, or truncated \(0 bytes\)"),
    "five bytes": (b"\x08\x00\x00\x00\x00", r"not safetensors, or truncated \(5 bytes\)"),
    "length alone": (b"\x00" * 8, r"its header:1:1: not JSON"),
    "header cut off": (
        save({"a": np.ones(9, np.float32)})[:40],
        r"not safetensors, or truncated \(40 bytes\)",
    ),
    "huge header": (b"\xff" * 7 + b"\x7f" + b"{}", r"not safetensors, or truncated \(10 bytes\)"),
    "header not JSON": (
        (4).to_bytes(8, "little") + b"{,,}",
        r"its header:1:2: not JSON .*; fetch it again",
    ),
    "header not UTF-8": (
        (9).to_bytes(8, "little") + b'{"\xff\xfe": 1}',
        r"its header: not UTF-8 text at byte 2",
    ),
    "header a list": (
        (2).to_bytes(8, "little") + b"[]",
        r"its header: must contain a JSON object, contains a list; fetch it again",
    ),
}


@pytest.mark.parametrize(("content", "message"), IMPOSTORS.values(), ids=IMPOSTORS)
def test_another_file_under_this_name_is_refused_saying_what_it_is(tmp_path, content, message):
    path = tmp_path / SINGLE
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message) as caught:
        read_header(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "epoch.ckpt"]
)
def test_a_folder_of_pickles_is_refused_with_the_way_out(tmp_path, name):
    (tmp_path / name).write_bytes(PICKLE)
    (tmp_path / "config.json").write_text("{}")
    (problem,) = problems(tmp_path)
    assert (
        f"contains {name}, a pickle, which can run code and is never read; if you trust it, convert it to"
        in problem
    )


def test_pickles_beside_safetensors_do_no_harm(tmp_path):
    save_file({"a": np.ones(2, np.float32)}, tmp_path / SINGLE)
    (tmp_path / "pytorch_model.bin").write_bytes(PICKLE)
    assert list(open_folder(tmp_path)) == ["a"]


def test_a_folder_without_weights_is_refused_listing_what_it_holds(tmp_path):
    assert problems(tmp_path) == (
        f"{tmp_path}: no {SINGLE} and no {INDEX}; the folder contains nothing",
    )
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "flax_model.msgpack").write_bytes(b"")
    assert problems(tmp_path)[0].endswith("; the folder contains config.json, flax_model.msgpack")


# ----------------------------------------------------------------------------------- header entries

ENTRIES = {
    "negative begin": entry(-4, 4, [2]),
    "end before begin": entry(8, 0, [2]),
    "size of another shape": entry(0, 8, [3]),
    "negative shape": entry(0, 8, [-1, -2]),
    "unknown dtype": entry(0, 8, [2], "F31"),
    "dtype not text": entry(0, 8, [2], 32),
    "no offsets": {"dtype": "F32", "shape": [2]},
    "three offsets": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]},
    "no object": [0, 8],
    "null": None,
    "shape not numbers": entry(0, 8, ["x"]),
}
RAW_ENTRIES = {
    "offsets are text": entry("0", "8", [2]),
    "offset is infinite": entry(float("inf"), 8, [2]),
    "shape is beyond 64 bits": entry(0, 8, [2**70]),
}


@pytest.mark.parametrize(
    "broken",
    [*ENTRIES.values(), *RAW_ENTRIES.values()],
    ids=[*ENTRIES, *RAW_ENTRIES],
)
def test_a_malformed_entry_is_refused_by_name(tmp_path, broken):
    write_raw(tmp_path / SINGLE, {"good": entry(0, 8, [2]), "broken": broken}, bytes(16))
    (problem,) = problems(tmp_path)
    assert problem.startswith(
        f"{tmp_path / SINGLE}: broken: malformed header entry or unknown dtype"
    )


def test_overlapping_tensors_are_refused(tmp_path):
    write_raw(tmp_path / SINGLE, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))
    with pytest.raises(Exception, match=r"[Oo]ffset"):
        load_file(tmp_path / SINGLE)
    assert "overlap" in problems(tmp_path)[0]


def test_a_truncated_file_says_which_tensors_lack_how_much(tmp_path):
    content = save({name: np.ones((4, 4), np.float32) for name in ("a", "b", "c")})
    (tmp_path / SINGLE).write_bytes(content[:-100])
    assert problems(tmp_path) == (
        f"{tmp_path / SINGLE}: b: truncated: 36 bytes are missing; fetch the file again",
        f"{tmp_path / SINGLE}: c: truncated: 100 bytes are missing; fetch the file again",
    )


def test_many_problems_are_counted(tmp_path):
    write_raw(tmp_path / SINGLE, {f"t{i}": entry(0, 8, [2], "F31") for i in range(50)}, bytes(8))
    found = problems(tmp_path)
    assert len(found) == 21
    assert found[-1] == "... and 30 more"


@pytest.mark.parametrize(
    ("header", "data", "text"),
    [
        ({"a": entry(0, 4, [1])}, b"1234more", "4 bytes do not belong to a tensor"),
        (
            {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
            b"1" * 12,
            "4 bytes do not belong to a tensor",
        ),
        (
            (
                b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": {"dtype":'
                b' "F32", "shape": [1], "data_offsets": [0, 4]}}'
            ),
            b"1234",
            "its header: has the key 'a' twice",
        ),
        ({"a": entry(0, 4, [1e400])}, b"1234", "malformed header entry"),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, b"", "its header: nested too deeply"),
    ],
)
def test_what_the_official_library_refuses_is_refused(tmp_path, header, data, text):
    with pytest.raises(WeightsError, match=text):
        read_header(write_raw(tmp_path / "model.safetensors", header, data))
