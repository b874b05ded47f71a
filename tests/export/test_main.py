"""The command `python -m jaxpeft.export`: arguments, exit codes, what it prints, and signals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest

import jaxpeft
from jaxpeft.export import __main__ as command
from jaxpeft.export import merged_model, to_peft
from tests.hub.helpers import edited, trained
from tests.models.conftest import reference  # noqa: F401 - a fixture


@pytest.fixture
def adapter(reference: Callable[..., Any], tmp_path: Path) -> Path:
    """A LoRA of a tiny BERT, with the leaves that are trained moved."""
    model, base = reference("bert", "sequence_classification").load()
    method = jaxpeft.LoRA(rank=2, targets=("query",))
    params = trained(method, jaxpeft.rewrite(method, base, jax.random.key(0)))
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        (
            (),
            (
                "3 problems",
                "--adapter: is required",
                "--to: is required",
                "--output: is required; see --help",
            ),
        ),
        (
            ("--adapter=a", "--to=gguf", "--out=b"),
            ("--to: must be one of 'peft', 'merged', 'merged_quantized_reference'", "is 'gguf'"),
        ),
        (("--adapter=a", "--to=peft", "--out=b", "stray"), ("'stray': not an option",)),
        (
            ("--adapter=a", "--to=merged", "--out=b", "--dtype=int4"),
            ("--dtype: must be one of 'float32', 'bfloat16', 'float16'", "is 'int4'"),
        ),
        (
            ("--adaptor=a", "--to=peft", "--out=b"),
            ("--adaptor: no such option; did you mean '--adapter'", "see --help"),
        ),
    ],
)
def test_bad_arguments_are_named(
    arguments: tuple[str, ...], texts: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert all(text in error for text in texts), error
    assert "Traceback" not in error


def test_bad_arguments_are_told_without_jax() -> None:
    check = (
        "import sys; from jaxpeft.export.__main__ import main; code = main(sys.argv[1:]);"
        " print('LOADED', [m for m in ('jax', 'flax', 'transformers') if m in sys.modules]);"
        " sys.exit(code)"
    )
    command = [sys.executable, "-c", check, "--to=gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2
    assert "LOADED []" in done.stdout


def test_help_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "--adapter DIR --to FORMAT --output DIR",
        "--base:",
        "--dtype:",
        "--pooling:",
    ):
        assert text in shown


@pytest.mark.parametrize("to", ["peft", "merged"])
def test_the_last_lines_say_what_was_written_and_how_to_load_it(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    out = tmp_path / "out"
    assert command.main(["--adapter", str(adapter), "--to", to, "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    wanted = {
        "merged": [
            f"wrote {out}: bert with lora merged, float32, ",
            "error of the merge: 0 of the adapter's change",
            "largest logit difference from the unmerged adapter: ",
            "largest logit difference of the adapter from its base: ",
            (
                f"load it: transformers.AutoModelForSequenceClassification.from_pretrained('{out}')"
                f" or jaxpeft.load('{out}', "
            ),
        ],
        "peft": [
            f"wrote {out}: lora adapter, ",
            "largest logit difference after loading: 0",
            "largest logit difference of the adapter from its base: ",
            (
                f"load it: peft.PeftModel.from_pretrained(base_model, '{out}') or"
                f" jaxpeft.load_adapter('{out}', "
            ),
        ],
    }
    assert len(lines) == len(wanted[to])
    for line, start in zip(lines, wanted[to], strict=True):
        assert line.startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "out"]


def test_refusals_are_a_line_and_exit_code_2(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: Any,
) -> None:
    other = edited(
        reference("bert", "sequence_classification").folder,
        tmp_path / "other",
        config=lambda c: c.update(layer_norm_eps=0.5),
    )
    out, given = tmp_path / "out", ["--adapter", str(adapter), "--out", str(tmp_path / "out")]
    for arguments, text in (
        (["--to=merged_quantized_reference"], "was trained on an unquantized base"),
        (["--to=merged", f"--base={other}"], "the adapter was trained on another base"),
        (
            ["--to=merged", "--task=encoder"],
            "--task: is encoder, but the adapter was trained for sequence_classification",
        ),
        (["--to=peft", f"--out={other}"], "is not empty; choose a new folder"),
    ):
        assert command.main([*given, *arguments]) == 2
        told = capsys.readouterr().err.splitlines()[-1]
        assert told.startswith("jaxpeft: ") and text in told
        assert not out.exists()


def test_a_traceback_is_shown_if_it_is_asked_for(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--adapter", str(adapter), "--to=peft", "--out", str(adapter)]
    assert command.main([*arguments, "--traceback"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_what_computes_something_else_is_exit_code_1_and_is_not_kept(
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(to_peft, "gap_of", lambda found, wanted: float("nan"))
    assert (
        command.main(["--adapter", str(adapter), "--to=peft", "--out", str(tmp_path / "out")]) == 1
    )
    assert "logits differ by nan on the probe batch" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_and_nothing_is_left(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: int
) -> None:
    monkeypatch.setattr(merged_model, "config_of", lambda *args: os.kill(os.getpid(), signum))
    before = signal.getsignal(signum)
    with pytest.raises(SystemExit) as stopped:
        command.main(["--adapter", str(adapter), "--to=merged", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 128 + signum
    assert signal.getsignal(signum) is before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
