"""The command `python -m jaxpeft.generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxpeft
from jaxpeft.generate import __main__ as command
from jaxpeft.generate import session as session_module
from jaxpeft.generate.session import Session
from jaxpeft.inference.adapted_model import load_adapted
from jaxpeft.processes.lock import lock_output

MOST = "--max-new-tokens=6"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            (),
            (
                "--adapter: is required, or --model for a base alone; see --help",
                "--prompt, --prompts, --chat, --input: exactly one is required, none is given; see --help",
            ),
        ),
        (("--model=m", "--prompt=a", "--chat"), ("--prompt and --chat are given",)),
        (("--model=m", "--prompts=a"), ("--output: is required with --prompts",)),
        (
            ("--model=m", "--prompt=a", "--output=b", "--samples=2", "--log-probs", "--system=s"),
            (
                "--output: has no effect without --prompts or --input; remove it",
                "--samples: has no effect without --prompts; remove it",
                "--log-probs: has no effect without --prompts; remove it",
                "--system: --prompt continues a text without a chat",
            ),
        ),
        (("--model=m", "--prompt=a", "--top-p=0.9"), ("--top-p: has no effect at temperature 0",)),
        (("--model=m", "--prompt=a", "--temperature=-1"), ("--temperature: must be at least 0",)),
    ],
)
def test_wrong_arguments_are_told_before_a_model_is_read(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    assert command.main([*arguments]) == 2
    said = capsys.readouterr().err
    for text in texts:
        assert text in said


def test_one_prompt_is_streamed_to_the_terminal(
    capsys: pytest.CaptureFixture[str], llama: str, adapter: Path
) -> None:
    texts: dict[str, str] = {}
    for name, given in (("base", ["--model", llama]), ("tuned", ["--adapter", str(adapter)])):
        assert command.main([*given, "--prompt", "word1 word2", MOST]) == 0
        texts[name] = capsys.readouterr().out
    loaded = load_adapted(None, adapter)
    ids = loaded.tokenizer("word1 word2 word9", add_special_tokens=False)["input_ids"]
    ids = [loaded.tokenizer.bos_token_id, *ids]  # its separator follows the prompt
    wanted = jaxpeft.generate(loaded.model, loaded.params, [ids], max_new_tokens=6)[0]
    assert (
        texts["tuned"].split() == loaded.tokenizer.decode(wanted, skip_special_tokens=True).split()
    )
    assert texts["base"] != texts["tuned"]


def rows_of(path: str | Path) -> list[Any]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_rows_are_written_with_their_completions(
    llama: str, adapter: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    rows = [
        {"prompt": "word1 word2", "id": 7},
        {"messages": [{"role": "user", "content": "word5"}]},
        {"prompt": "word3"},
    ]
    source, out = write_jsonl(*rows), tmp_path / "deep" / "out.jsonl"
    given = ["--adapter", str(adapter), "--prompts", source, MOST]
    assert command.main([*given, "--output", str(out)]) == 0
    found = rows_of(out)
    assert [{k: v for k, v in row.items() if k != "completion"} for row in found] == rows
    assert all(isinstance(row["completion"], str) for row in found)
    assert len({row["completion"] for row in found}) > 1
    assert not (tmp_path / "deep" / "out.jsonl.partial").exists()
    again = tmp_path / "again.jsonl"
    assert command.main([*given, "--output", str(again), "--batch-size=1"]) == 0
    assert rows_of(again) == found
    base = tmp_path / "base.jsonl"
    assert (
        command.main(
            [
                "--model",
                llama,
                "--prompts",
                source,
                "--output",
                str(base),
                MOST,
                "--chat-template=chatml",
            ]
        )
        == 0
    )
    assert [r["completion"] for r in rows_of(base)] != [r["completion"] for r in found]


@pytest.mark.slow
def test_several_samples_and_log_probabilities(
    adapter: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    source = write_jsonl({"prompt": "word1"}, {"prompt": "word2"})
    given = [
        "--adapter",
        str(adapter),
        "--prompts",
        source,
        MOST,
        "--temperature=1",
        "--samples=3",
        "--log-probs",
    ]
    texts = []
    for name, size in (("a", 32), ("b", 1)):
        out = tmp_path / name
        assert command.main([*given, "--output", str(out), f"--batch-size={size}"]) == 0
        texts.append(rows_of(out))
    for row, alone in zip(*texts, strict=True):
        np.testing.assert_allclose(
            np.concatenate(row.pop("completion_log_probs")),
            np.concatenate(alone["completion_log_probs"]),
            rtol=1e-5,
        )
        assert row == {key: alone[key] for key in row}
    for row in texts[1]:
        assert len(row["completions"]) == 3 == len(set(row["completions"]))
        for tokens, log_probs in zip(
            row["completion_tokens"], row["completion_log_probs"], strict=True
        ):
            assert len(tokens) == len(log_probs)
            assert all(value < 0 for value in log_probs)


def test_a_stop_text_ends_a_completion_and_is_left_out(
    adapter: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl({"prompt": "word1"})
    given = ["--adapter", str(adapter), "--prompts", source, "--max-new-tokens=12"]
    assert command.main([*given, "--output", str(tmp_path / "a")]) == 0
    whole = rows_of(tmp_path / "a")[0]["completion"]
    word = whole.split()[3]
    assert command.main([*given, "--output", str(tmp_path / "b"), "--stop", word]) == 0
    assert rows_of(tmp_path / "b")[0]["completion"] == whole[: whole.index(word)]
    capsys.readouterr()
    argv = ["--adapter", str(adapter), "--prompt", "word1", "--max-new-tokens=12", "--stop", word]
    assert command.main(argv) == 0
    assert capsys.readouterr().out == whole[: whole.index(word)] + "\n"


def test_an_interrupted_file_continues_and_another_run_does_not(
    adapter: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source, out = write_jsonl(*({"prompt": f"word{i}"} for i in range(5))), tmp_path / "out.jsonl"
    given = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), "--batch-size=2"]
    real, calls = Session.complete, list[int]()

    def complete(self: Any, prompts: Any, first: int = 0, **options: Any) -> Any:
        calls.append(first)
        if first == 4 and len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, prompts, first, **options)

    monkeypatch.setattr(Session, "complete", complete)
    assert command.main([*given, MOST]) == 130
    partial = out.with_name("out.jsonl.partial")
    assert not out.exists()
    assert len(rows_of(partial)) == 5  # the header and four rows
    partial.write_bytes(partial.read_bytes() + b'{"prompt": "wor')
    assert command.main([*given, "--max-new-tokens=7"]) == 2
    assert "was begun with other rows, options or another model" in capsys.readouterr().err
    assert command.main([*given, MOST]) == 0
    assert calls == [0, 2, 4, 4]
    assert [row["prompt"] for row in rows_of(out)] == [f"word{i}" for i in range(5)]
    assert command.main([*given, MOST]) == 2
    assert f"--output {out}: exists already; choose another file" in capsys.readouterr().err


def test_rows_are_checked_before_the_model_is_loaded(
    llama: str,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session_module, "load_adapted", None)
    source = write_jsonl({"a": 1})
    assert (
        command.main(["--model", llama, "--prompts", source, "--output", str(tmp_path / "o")]) == 2
    )
    assert "in.jsonl:1:1 (row 1): has no prompt, messages or instruction" in capsys.readouterr().err
    assert (
        command.main(["--model", llama, "--prompts", str(tmp_path / "no.jsonl"), "--output", "o"])
        == 2
    )


@pytest.mark.parametrize("flag", ["--chat", "--prompts"])
def test_a_missing_template_is_told_before_the_weights_are_read(
    llama: str, write_jsonl: Callable[..., str], tmp_path: Path, capsys: Any, monkeypatch: Any,
    flag: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(session_module, "load_adapted", None)
    rows = write_jsonl({"messages": [{"role": "user", "content": "word1"}]})
    more = [flag] if flag == "--chat" else [flag, rows, "--output", str(tmp_path / "out.jsonl")]
    assert command.main(["--model", llama, *more]) == 2
    assert "--chat-template: the tokenizer has no template" in capsys.readouterr().err


def test_a_classifier_generates_no_text(
    tiny_models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import jax

    model, base = jaxpeft.load(tiny_models["bert"], task="sequence_classification", num_labels=2)
    method = jaxpeft.LoRA(rank=2, targets=("query",))
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)
    assert command.main(["--adapter", str(tmp_path / "a"), "--prompt", "x"]) == 2
    assert (
        "was trained for sequence_classification, which generates no text"
        in capsys.readouterr().err
    )


def test_two_processes_do_not_write_one_output(
    adapter: Path, tmp_path: Path, write_jsonl: Callable[..., str], capsys: Any
) -> None:
    source, out = write_jsonl({"prompt": "word1"}), tmp_path / "out.jsonl"
    argv = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), MOST]
    with lock_output(out):
        assert command.main(argv) == 2
    assert f"--output {out}: another process writes it (" in capsys.readouterr().err
    assert command.main(argv) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_fields_of_a_row_are_kept_and_halves_of_characters_escaped(
    adapter: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    row = {"prompt": "word1", "completion": "word2", "x": "\ud800é"}
    source, out = write_jsonl(row), tmp_path / "out.jsonl"
    argv = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), MOST]
    assert command.main(argv) == 0
    (found,) = rows_of(out)
    assert found.pop("completion") != "word2"
    assert found == {"prompt": "word1", "reference_completion": "word2", "x": "\ud800é"}


def test_another_template_is_another_run(
    adapter: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    template, out = tmp_path / "t.jinja", tmp_path / "out.jsonl"
    source = write_jsonl({"messages": [{"role": "user", "content": "word5"}]})
    argv = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), MOST]
    argv += ["--chat-template", str(template)]
    with monkeypatch.context() as patch:
        patch.setattr(Session, "complete", interrupt)
        template.write_text("{{ messages[0].content }}")
        assert command.main(argv) == 130
    template.write_text("{{ messages[0].content }} word9")
    assert command.main(argv) == 2
    assert "was begun with other rows, options or another model" in capsys.readouterr().err
    template.write_text("{{ messages[0].content }}")
    assert command.main(argv) == 0


def interrupt(*_: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def test_an_interruption_is_told_in_one_line(
    adapter: Path,
    tmp_path: Path,
    write_jsonl: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Session, "complete", interrupt)
    source, out = write_jsonl({"prompt": "word1"}), tmp_path / "out.jsonl"
    argv = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), MOST]
    assert command.main(argv) == 130
    assert "stopped after 0 of 1 rows; the same command continues" in caplog.text


def test_texts_with_a_separator_are_cut_at_it(
    adapter: Path, tmp_path: Path, write_jsonl: Callable[..., str]
) -> None:
    plain = write_jsonl({"prompt": "word1 word2"}, name="plain.jsonl")
    texts = write_jsonl({"text": "word1 word2 word9 word3 word4"}, name="texts.jsonl")
    found: list[Any] = []
    for source in (plain, texts):
        out = tmp_path / f"{Path(source).stem}.out.jsonl"
        argv = ["--adapter", str(adapter), "--prompts", source, "--output", str(out), MOST]
        assert command.main(argv) == 0
        found.append(rows_of(out)[0]["completion"])
    assert found[0] == found[1]
    out = tmp_path / "named.jsonl"
    argv = ["--adapter", str(adapter), "--prompts", texts, "--output", str(out), MOST]
    assert command.main([*argv, "--columns", "prompt=text"]) == 0
    assert command.main([*argv[:-1], MOST, "--columns", "nonsense=text"]) == 2
