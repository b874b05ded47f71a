"""Bad input: rows, options, folders and names are refused before anything is computed, with place,
value and fix.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import GOOD, Job, Marks, command, files, here

ROW = b'{"text": "word1 word2", "label": "red"}\n'


def refused(
    job: Job, marks: Marks, *texts: str, arguments: tuple[str, ...] = (), most: int = 5
) -> None:
    """The run is refused with exit code 2, says so, and leaves what was in its folder as it was."""
    job.workdir.mkdir()
    (job.workdir / "note").write_text("mine")
    done = job.here(*arguments)
    marks.exit(done, 2)
    marks.message(done, *texts, most=most)
    marks.early(done)
    marks.kept({"note": b"mine"}, files(job.workdir))


# ------------------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("inside", ["", "deep/er"])
def test_case_11_a_folder_that_cannot_be_written_is_refused_before_jax_is_imported(
    job: Job, marks: Marks, tmp_path: Path, inside: str
) -> None:
    (tmp_path / "file").write_text("mine")
    folder = tmp_path / "file" / inside
    check = (
        "import sys; from jaxpeft.train.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code if not {'jax', 'flax', 'transformers'} & set(sys.modules) else 99)"
    )
    done = command(["-c", check, "--config", str(job.config), "--workdir", str(folder)])
    marks.exit(done, 2)
    marks.message(done, f"--workdir {folder}: cannot be written (", "); give another folder")
    marks.early(done)
    marks.kept({"file": b"mine"}, files(tmp_path, ["file"]))


@pytest.mark.slow
def test_case_11_a_folder_that_is_missing_is_made(
    job: Job, whole: Job, marks: Marks, tmp_path: Path
) -> None:
    deep = job.at(tmp_path / "a" / "b" / "c")
    done = deep()
    marks.exit(done, 0)
    marks.same_end(deep, whole)


# --------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", ":1:1: the file is empty; give a file with at least one row"),
        (ROW + b"\n" + ROW, ":2:1: blank line; remove it"),
        (ROW * 3 + ROW[:-9], ":4:32: not JSON ("),
        (ROW + b'{"text": "caf\xe9", "label": "red"}\n', ":2:14: not UTF-8 (byte 0xe9): "),
        (ROW + b'{"text": "word1", "label": NaN}\n', ":2:28: NaN is not JSON: "),
        (ROW + b'{"text": "word1"}\n', ":2:1 (row 2): field 'label' is missing: "),
        (
            ROW + b'{"text": 7, "label": "red"}\n',
            ":2:1 (row 2): field 'text' contains a int, not a string: ",
        ),
        (ROW + b'["word1", "red"]\n', ":2:1: a row must be a JSON object, not a list: "),
        (ROW + b'{"text": " ", "label": "red"}\n', ":2:1 (row 2): field 'text' is empty: "),
        (ROW.decode().encode("utf-16")[:-1], ":1:40: not utf-16; set data.encoding to the file's"),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            ":1:1: a Git LFS pointer instead of the data",
        ),
    ],
    ids=[
        "empty",
        "blank",
        "cut",
        "latin1",
        "nan",
        "missing",
        "type",
        "list",
        "nothing",
        "utf16",
        "pointer",
    ],
)
def test_case_28_a_broken_row_is_told_with_file_line_column_text_and_fix(
    job: Job, marks: Marks, tmp_path: Path, content: bytes, said: str
) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_bytes(content)
    refused(job, marks, f"{rows}{said}", "; ", arguments=(f"--config.data.train={rows}",))


def test_case_28_the_first_20_are_told_at_once_and_the_rest_counted(
    job: Job, marks: Marks, tmp_path: Path
) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_bytes(ROW + b'{"text": "' + b"x" * 300 + b"\n" * 1 + b"{]\n" * 24)
    texts = [f"{rows}:{line}:" for line in range(2, 22)]
    refused(
        job,
        marks,
        "21 problems:",
        *texts,
        "... and 5 more problems",
        arguments=(f"--config.data.train={rows}",),
        most=22,
    )


@pytest.mark.slow
def test_case_28_a_mark_and_line_ends_of_windows_do_no_harm(
    job: Job, whole: Job, marks: Marks, tmp_path: Path
) -> None:
    rows = tmp_path / "mine.jsonl"
    given = Path(whole.config.parent / "rows.jsonl").read_bytes()
    rows.write_bytes(b"\xef\xbb\xbf" + given.replace(b"\n", b"\r\n"))
    done = job.here(f"--config.data.train={rows}")
    marks.exit(done, 0)
    marks.message(done, "48 rows, 463 tokens")
    marks.in_time(done)
    marks.same_end(job, whole)


# ------------------------------------------------------------------------------------------- tokens


def model_with(
    source: Path, target: Path, file: str, change: Callable[[dict[str, Any]], Any]
) -> Path:
    """Copy a model folder and changes one of its JSON files."""
    shutil.copytree(source, target)
    content = json.loads((target / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_case_29_a_token_that_the_model_has_not_is_refused(
    job: Job, chats: Any, tiny_models: Mapping[str, Path], marks: Marks, tmp_path: Path, kind: str
) -> None:
    vocab = json.loads((tiny_models[kind] / "config.json").read_text())["vocab_size"]

    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer["model"]["vocab"]["word3"] = vocab

    model = model_with(tiny_models[kind], tmp_path / "model", "tokenizer.json", change)
    run = chats([GOOD] * 20) if kind == "llama" else job
    said = (
        f"its vocabulary has 65 tokens, the model's {vocab}, and the data contains token {vocab}"
        " ('word3')"
    )
    refused(
        run,
        marks,
        said,
        "use the model's own tokenizer",
        arguments=(f"--config.model.path={model}",),
    )


@pytest.mark.slow
@pytest.mark.parametrize("pad", [None, "[SEP]"])
def test_case_29_no_pad_token_or_one_that_is_eos_does_no_harm(
    chats: Any, tiny_models: Mapping[str, Path], marks: Marks, tmp_path: Path, pad: str | None
) -> None:
    def change(tokenizer: dict[str, Any]) -> None:
        tokenizer.pop("pad_token") if pad is None else tokenizer.update(pad_token=pad)

    model = model_with(tiny_models["llama"], tmp_path / "model", "tokenizer_config.json", change)
    job, other = chats([GOOD, [*GOOD, *GOOD]] * 10), tmp_path / "other"
    done = job.here(f"--config.model.path={model}")
    marks.exit(done, 0)
    marks.in_time(done)
    assert job.at(other).here().returncode == 0
    marks.same_end(job, job.at(other))


# -------------------------------------------------------------------------------------------- chats

ASKED, ANSWER, SYSTEM = GOOD[0], GOOD[1], {"role": "system", "content": "word5"}


@pytest.mark.parametrize(
    ("messages", "said", "fix"),
    [
        (
            [ASKED, {"role": "asistant", "content": "word3"}],
            "has the unknown role 'asistant' in turn 2",
            "did you mean 'assistant'?",
        ),
        (
            [SYSTEM, SYSTEM, ASKED, ANSWER],
            "has 2 system turns (1, 2)",
            "keep one, as the first turn",
        ),
        ([ASKED, SYSTEM, ANSWER], "has its system turn at position 2", "make it the first turn"),
        (
            [ASKED, {"role": "assistant", "content": " "}],
            "has an empty turn 2 (assistant)",
            "fill it in or remove the row",
        ),
        (
            [ASKED, {"role": "assistant", "content": None}],
            "has nothing as the content of turn 2",
            "write it as a string",
        ),
        ([ASKED], "has no assistant turn", "add one or remove the row"),
        (
            [{"role": "user", "content": "fail"}, ANSWER],
            "the chat template fails: word4 must not fail",
            "correct the row",
        ),
    ],
)
def test_case_30_a_chat_that_cannot_be_written_is_told_with_row_turn_and_reason(
    chats: Any, marks: Marks, tmp_path: Path, messages: list[dict[str, Any]], said: str, fix: str
) -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'fail' %}{{ raise_exception('word4 must not"
        " fail') }}{% endif %}{{ m.role }} {{ m.content }} {% endfor %}"
    )
    job = chats([*[GOOD] * 11, messages], template, data__validation_share=0.05)
    refused(job, marks, f"{tmp_path}/rows.jsonl:12:1 (row 12): ", said, fix)


# ------------------------------------------------------------------------------------------ options

OPTIONS = {
    "--config.train.batchsize=8": "config.train.batchsize: no such option; did you mean",
    "--config.optimizer.learning_rate=fast": (
        "config.optimizer.learning_rate: must be a number, is 'fast' (str)"
    ),
    "--config.method.rank=eight": "config.method.rank: must be an integer, is 'eight' (str)",
    "--config.optimizer.weight_decay=-1": (
        "config.optimizer.weight_decay: must be at least 0, is -1"
    ),
    "--config.method.dropout=1.0": "config.method.dropout: must be below 1, is 1.0",
    "--config.train.epochs=3": (
        "config.train.steps: 8 and epochs 3.0 cannot both be set; set one to None"
    ),
    "--config.optimizer.warmup_steps=9": (
        "optimizer.warmup_steps: 9 warm-up steps must be fewer than the run's 8 steps"
    ),
    "--config.model.task=classify": "config.model.task: must be one of 'causal_lm', ",
}


def test_case_35_every_wrong_option_is_told_at_once_without_importing_jax(
    job: Job, marks: Marks
) -> None:
    job.workdir.mkdir()
    (job.workdir / "note").write_text("mine")
    check = (
        "import sys; from jaxpeft.train.__main__ import main; code = main(sys.argv[1:]); "
        "sys.exit(code if not {'jax', 'flax', 'torch', 'transformers'} & set(sys.modules) else 99)"
    )
    given = [
        word for word in OPTIONS if "warmup" not in word
    ]  # said once no other problem of the length is left
    done = command(
        ["-c", check, "--config", str(job.config), "--workdir", str(job.workdir), *given]
    )
    marks.exit(done, 2)
    marks.message(
        done, f"{len(given)} problems:", *(OPTIONS[word] for word in given), most=1 + len(given)
    )
    marks.early(done)
    marks.kept({"note": b"mine"}, files(job.workdir))


@pytest.mark.parametrize("option", OPTIONS)
def test_case_35_a_wrong_option_is_told_alone(job: Job, marks: Marks, option: str) -> None:
    refused(job, marks, OPTIONS[option], arguments=(option,))


# -------------------------------------------------------------------------------------------- names

HOSTILE = {
    "up": "../../x",
    "root": "/abs",
    "through": "a/../b",
    "dots": "..",
    "long": "a" * 10_000,
    "nul": "a\0b",
    "dash": "-x",
    "none": "",
}


@pytest.mark.parametrize("name", HOSTILE.values(), ids=HOSTILE)
def test_case_39_a_name_that_leads_elsewhere_is_refused(
    job: Job, marks: Marks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    inside = tmp_path / "here" / "deep"
    inside.mkdir(parents=True)
    monkeypatch.chdir(inside)
    before = set(tmp_path.rglob("*"))
    done = here("--config", str(job.config), f"--name={name}")
    marks.exit(done, 2)
    said = (
        "jaxpeft: --name: must be text without NUL characters" if "\0" in name else "jaxpeft: name "
    )
    marks.message(
        done,
        said,
        *(() if "\0" in name else (": must be 1 to 64 letters, digits, '.', '_' or '-'",)),
    )
    assert len(done.error) < 400
    marks.early(done)
    assert set(tmp_path.rglob("*")) == before
    marks.kept({}, {})


@pytest.mark.parametrize("name", [HOSTILE["long"], HOSTILE["nul"]], ids=["long", "nul"])
def test_case_39_a_folder_that_no_system_has_is_refused(
    job: Job, marks: Marks, tmp_path: Path, name: str
) -> None:
    refused(
        job.at(tmp_path / "run"),
        marks,
        *(
            ("--workdir: must be text without NUL characters",)
            if "\0" in name
            else ("--workdir ", "cannot be written (")
        ),
        arguments=(f"--workdir={tmp_path}/{name}",),
    )


@pytest.mark.parametrize("link", ["run", "adapter", "checkpoints", "config.json"])
def test_case_39_a_link_out_of_the_folder_is_refused(
    job: Job, marks: Marks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: str
) -> None:
    outside, runs = tmp_path / "outside", tmp_path / "here" / "runs"
    outside.mkdir()
    (outside / "note").write_text("mine")
    target = runs / "mine" if link == "run" else runs / "mine" / link
    target.parent.mkdir(parents=True)
    target.symlink_to(outside / "note" if "." in link else outside)
    monkeypatch.chdir(tmp_path / "here")
    done = here("--config", str(job.config), "--name=mine")
    marks.exit(done, 2)
    said = (
        "is a link to a folder outside of runs; give another name"
        if link == "run"
        else ": is a link out of the run's folder"
    )
    marks.message(done, f"mine/{link}" if link != "run" else "mine", said)
    marks.early(done)
    marks.kept({"note": b"mine"}, files(outside))
