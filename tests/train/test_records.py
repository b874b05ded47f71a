"""The files of figures: whole lines only, and nothing twice after an interruption."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxpeft.config.train_config import LogConfig
from jaxpeft.train import records


def test_lines_are_written_as_they_come(tmp_path: Path) -> None:
    writer = records.JsonLines(tmp_path / "metrics.jsonl", 0)
    writer.write(1, {"loss": 0.5})
    assert records.read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 0.5}]
    writer.close()


@pytest.mark.parametrize("cut", ["", '{"step": 4, "lo', "{"])
def test_a_resumed_run_keeps_the_lines_up_to_its_step_and_drops_a_torn_one(
    tmp_path: Path, cut: str
) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(
        "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in (1, 2, 3)) + cut
    )
    writer = records.JsonLines(file, 2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in records.read_lines(file)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


WHOLE = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
DAMAGE = {
    "one flipped bit": b'{"step": 2\x2e "loss": 2.0}',
    "not UTF-8": b'{"step": 2, "lo\xf3s": 2.0}',
    "NUL": b'{"step": 2, "loss": 2.0}\x00',
    "two lines in one": b'{"step": 2, "loss": 2.0}{"step": 2, "loss": 2.0}',
    "brackets without end": b"[" * 200_000,
    "a huge line": b"x" * 3_000_000,
    "a huge number": b'{"step": 2, "loss": ' + b"9" * 5000 + b"}",
    "no object": b"[2]",
    "null": b"null",
    "no step": b'{"loss": 2.0}',
    "a step that is no number": b'{"step": "2", "loss": 2.0}',
    "a step that is not whole": b'{"step": 2.5, "loss": 2.0}',
    "a figure that is none": b'{"step": 2, "loss": {}}',
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_line_is_told_and_put_aside_and_the_others_stay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes
) -> None:
    file, lines = tmp_path / "metrics.jsonl", [json.dumps(line).encode() for line in WHOLE]
    file.write_bytes(b"\n".join([lines[0], damage, *lines[1:], b""]))
    assert records.read_lines(file) == WHOLE
    writer = records.JsonLines(file, 3)
    writer.write(4, {"loss": 4.0})
    writer.close()
    assert records.read_lines(file) == [*WHOLE, {"step": 4, "loss": 4.0}]
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == damage + b"\n"
    assert (
        "moved damaged lines (2) to metrics.jsonl.damaged and kept the other lines" in caplog.text
    )


def test_every_flipped_bit_of_a_file_leaves_the_lines_that_it_is_not_in(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps(line) + "\n" for line in WHOLE).encode()
    for bit in range(0, 8 * len(whole), 7):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        records.JsonLines(file, 9).close()
        at = whole[: bit // 8].count(b"\n")
        # a line feed that is lost takes the line behind it along
        near = {at, at + 1} if whole[bit // 8 : bit // 8 + 1] == b"\n" else {at}
        assert [
            line
            for i, line in enumerate(WHOLE)
            if i not in near and line not in records.read_lines(file)
        ] == []


def test_of_lines_that_stand_there_twice_the_last_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [
        {"step": 1, "loss": 1.0},
        {"step": 1, "validation/loss": 3.0},
        {"step": 2, "loss": 2.0},
        {"step": 1, "loss": 1.5},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    records.JsonLines(file, 2).close()
    assert records.read_lines(file) == [{"step": 1, "loss": 1.5}, *lines[1:3]]


def test_a_new_run_begins_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    records.JsonLines(tmp_path / "metrics.jsonl", 0).close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def events(folder: Path) -> list[Any]:
    """Read the events of a folder, oldest file first: each is a length, its checksum, the message,
    its checksum.
    """
    from tensorboardX.proto.event_pb2 import Event

    found: list[Any] = []
    for file in sorted(folder.glob("events.*")):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (size,) = struct.unpack_from("<Q", raw, at)
            found.append(Event.FromString(raw[at + 12 : at + 12 + size]))
            at += size + 16
    return found


def test_tensorboard_is_told_to_drop_what_a_resumed_run_writes_again(tmp_path: Path) -> None:
    first = records.TensorBoard(tmp_path, 0)
    for step in (1, 2, 3):
        first.write(step, {"loss": 0.5})
    first.close()
    (tmp_path / "events.out").unlink(missing_ok=True)
    for file in tmp_path.glob("events.*"):
        file.rename(tmp_path / "events.0")
    assert [e.step for e in events(tmp_path) if e.HasField("summary")] == [1, 2, 3]
    second = records.TensorBoard(tmp_path, 2)
    second.write(3, {"loss": 0.25})
    second.close()
    starts = [
        e for e in events(tmp_path) if e.HasField("session_log") and e.session_log.status == 1
    ]
    assert [start.step for start in starts] == [3]


def test_weights_and_biases_gets_the_figures_and_the_runs_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    run = SimpleNamespace(
        log=lambda figures, step: calls.append((step, figures)),
        finish=lambda: calls.append("finished"),
    )
    module = SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(__import__("sys").modules, "wandb", module)
    folder = tmp_path / "rank8"
    folder.mkdir()
    writers = records.open_writers(LogConfig(wandb="mine", tensorboard=False), folder, 0)
    for writer in writers:
        writer.write(1, {"loss": 0.5})
        writer.close()
    assert calls[0] == {
        "project": "mine",
        "name": "rank8",
        "id": "rank8",
        "dir": str(folder),
        "resume": "allow",
    }
    assert calls[1:] == [(1, {"loss": 0.5}), "finished"]
