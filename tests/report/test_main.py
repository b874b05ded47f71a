"""The command: what it reads, and what it refuses by name."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.report.__main__ import main
from tests.report.conftest import EVALUATION, SAMPLE, START, WriteRun
from tests.report.pages import Page


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main([*words]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    return shown


def test_an_evaluation_is_shown_with_its_intervals(write_run: WriteRun, tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    run = write_run()
    file.write_text(json.dumps({**EVALUATION, "model": f"{run}/adapter"}))
    out = tmp_path / "page.html"
    words = ["--run", str(run), "--evaluation", str(file), "--out", str(out)]
    assert main(words) == 0
    html = out.read_text()
    found = Page(html)
    assert "Another adapter" not in found.text
    assert 'title="base /data/models/stories260K/hf">base</th>' in html
    assert "Evaluation on 200 rows of test.jsonl" in found.headings
    for part in (
        "Note: the base has no head.",
        "base tuned difference p value and 90% interval",
        "accuracy 0.2000 0.1000 to 0.3000 0.8000 0.7000 to 0.9000 better +0.6000",
        "+0.6000 +0.5000 to +0.7000 < 0.002 0 1",
        "loss lower is better - 2.5000 2.0000 to 3.0000 - - 2 3",
        "compared with base: better in 130, worse in 10, equal in 60 (sign test p < 1e-06)",
        "lost 0.5000 0.2500 0.3333 80 red 0.9000",
        "red lost 24",
        "probability 0.50 to 1.00: 200 predictions, 58.0% correct",
        "24 rows of red, predicted as lost",
        "my card lost stolen lost",
        "Forgetting on 50 rows of stories.txt",
        "loss lower is better - 1.7500",
        "diverges from the base's by 0.2500 nats per token (0.2000 to 0.3000)",
        "98 % of the greedy answers changed (94 % to 100 %)",
    ):
        assert part in found.text, part
    lines = [(line["x1"], line["x2"]) for line in found.of("line") if "grid" not in line.values()]
    assert ("70.0", "90.0") in lines and ("10.0", "30.0") in lines and ("80.0", "80.0") in lines
    assert ("0.0", "100.0") in lines  # of the loss, on its own axis


@pytest.mark.parametrize("value", [1e308, -1e308, float("nan")])
def test_a_number_too_large_for_an_axis_is_only_printed(
    write_run: WriteRun, tmp_path: Path, value: float
) -> None:
    ends = {"value": value, "low": -1e308, "high": 1e308}
    metrics = {"loss": {**ends, "against": ends, "difference": ends, "p": 1}}
    file, out = tmp_path / "evaluation.json", tmp_path / "page.html"
    file.write_text(json.dumps({**EVALUATION, "metrics": metrics}))
    lines = [{"step": 1, "loss": value}, {"step": 2, "loss": 3.5}, {"step": 10**200, "loss": 1}]
    run = write_run(metrics=lines)
    assert main(["--run", str(run), "--evaluation", str(file), "--out", str(out)]) == 0
    found = Page(out.read_text())
    assert "-1e+308 to 1e+308" in found.text
    assert "training from 3.5 at step 2 to 3.5 at step 2" in out.read_text()
    drawn = {
        value
        for tag in ("line", "circle", "path")
        for one in found.of(tag)
        for value in one.values()
    }
    assert not {"nan", "inf"} & drawn


ADAPTER = "adapter_model.safetensors"


def test_an_evaluation_of_another_adapter_is_told(
    write_run: WriteRun, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = write_run()
    (run / "adapter").mkdir()
    (run / "adapter" / ADAPTER).write_bytes(b"weights")
    file, out = tmp_path / "evaluation.json", tmp_path / "page.html"

    def text(sha256: str) -> str:
        adapter = {"path": "/data/runs/rank8/adapter", "sha256": {ADAPTER: sha256}}
        model = {"model": "/data/runs/rank8/adapter", "adapter": adapter}
        file.write_text(json.dumps({**EVALUATION, **model}))
        assert main(["--run", str(run), "--evaluation", str(file), "--out", str(out)]) == 0
        return Page(out.read_text()).text

    # the same weights in a folder that was moved
    assert "Another adapter" not in text(hashlib.sha256(b"weights").hexdigest())
    assert not caplog.records
    said = f"the evaluation is of /data/runs/rank8/adapter, which is not the adapter of this run, {run}"
    shown = text("0" * 64)
    assert f"These numbers do not belong to this run: {said}/adapter." in shown
    assert "base rank8/adapter difference p value and 90% interval" in shown
    assert f"--evaluation {file}: {said}" in caplog.text


@pytest.mark.parametrize("problem", ["lm", "regression"])
def test_an_evaluation_of_another_task_is_refused(
    write_run: WriteRun, tmp_path: Path, capsys: pytest.CaptureFixture[str], problem: str
) -> None:
    file = tmp_path / "evaluation.json"
    data = {"path": "test.jsonl", "rows": 2, "problem": problem}
    file.write_text(json.dumps({**EVALUATION, "data": data}))
    shown = refused(capsys, "--run", str(write_run()), "--evaluation", str(file))
    assert f"--evaluation {file}: is of " in shown
    assert "is of sequence_classification (single_label); give an evaluation of this run's" in shown


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in EVALUATION.items() if key != name}


METRIC = {"accuracy": {"value": "high"}}
RESULT = {
    "metric": "loss",
    "split": "test",
    "test": {"loss": 1.5},
    "seconds": 2.5,
    "steps": 2,
    "best_step": 2,
    "trainable_parameters": 1,
    "total_parameters": 2,
}
"""What a run of a comparison writes, shortened."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"version": 2}, "version must be 1, is 2; write the file again"),
        (without("metrics"), "metrics: is missing; was it"),
        ({**EVALUATION, "metrics": {"f1": {}}}, "metrics.f1.value: is missing"),
        (
            {**EVALUATION, "metrics": METRIC},
            "metrics.accuracy.value: must be a number, is 'high' (str)",
        ),
        (
            {**EVALUATION, "metrics": {"f1": {"value": 1, "low": 0}}},
            "metrics.f1.high: must be a number if low is one, is None",
        ),
        (
            {**EVALUATION, "metrics": {"f1": {"value": 1, "p": "x"}}},
            "metrics.f1.p: must be a number or None, is 'x' (str)",
        ),
        (
            {**EVALUATION, "metrics": {"f1": {"value": 1, "p": -1}}},
            "metrics.f1.p: must be from 0 to 1, is -1.0",
        ),
        ({**EVALUATION, "metrics": {"f1": []}}, "metrics.f1: must be an object, is [] (list)"),
        (
            {**EVALUATION, "bootstrap": {"level": 95, "resamples": -1}},
            "bootstrap.level: must be in (0, 1), is 95.0",
        ),
        ({**EVALUATION, "classes": [{}]}, "classes[0].label: is missing"),
        ({**EVALUATION, "classes": "red"}, "classes: must be a list of objects, is 'red' (str)"),
        ({**EVALUATION, "confusion": {"labels": 1}}, "confusion.labels: must be a list of str"),
        ({**EVALUATION, "paired": {"wins": {"f1": {}}}}, "paired.wins.f1.wins: is missing"),
        ({**EVALUATION, "changed": [0]}, "changed: 0 is not the index of a row with both"),
        ({**EVALUATION, "changed": ["x"]}, "changed: 'x' is not the index of a row with both"),
        ({**EVALUATION, "bootstrap": {"level": []}}, "bootstrap.level: must be a number, is []"),
        (
            {**EVALUATION, "confusion": {"labels": ["a"], "counts": [[1, 2]]}},
            "confusion.counts: must have a row and a column for each label",
        ),
        (
            {**EVALUATION, "calibration": {**EVALUATION["calibration"], "edges": [0.0]}},
            "calibration.counts: must be one less than the edges",
        ),
    ],
)
def test_an_evaluation_of_another_form_is_refused(
    write_run: WriteRun,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, Any],
    said: str,
) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(content))
    shown = refused(capsys, "--run", str(write_run()), "--evaluation", str(file))
    assert f"{file}: {said}" in shown


def test_folders_that_are_no_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--run: is required: the folder of a run" in refused(capsys)
    gone, empty, comparison = (tmp_path / name for name in ("gone", "empty", "comparison"))
    empty.mkdir()
    comparison.mkdir()
    assert f"--output {gone}/report.html: {gone} is not a folder" in refused(
        capsys, "--run", str(gone)
    )
    out = ("--out", str(tmp_path / "page.html"))
    assert f"--run {gone}: no such folder; give the folder of a run" in refused(
        capsys, "--run", str(gone), *out
    )
    assert f"--run {empty}: has no config.json, so no run has started in it" in refused(
        capsys, "--run", str(empty)
    )
    for name in ("comparison.json", "config.json"):
        (comparison / name).write_text("{}")
    assert "is the folder of a comparison, whose page is comparison.html" in refused(
        capsys, "--run", str(comparison)
    )
    assert f"--output {empty}: is a folder" in refused(
        capsys, "--run", str(comparison), "--out", str(empty)
    )


def test_the_folder_of_the_adapter_stands_for_its_run(write_run: WriteRun) -> None:
    run = write_run()
    (run / "adapter").mkdir()
    assert main(["--adapter", str(run / "adapter")]) == 0
    assert (run / "report.html").is_file()


def test_a_missing_evaluation_is_named(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = refused(capsys, "--run", str(write_run()), "--evaluation", "gone.json")
    assert (
        "--evaluation gone.json: no such file; write it with `python -m jaxpeft.evaluate" in shown
    )


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        (
            {"run": {**START, "steps": "many"}},
            "run.json: steps: must be an integer, is 'many' (str)",
        ),
        ({"run": {**START, "labels": [1]}}, "run.json: labels[0]: must be a string, is 1"),
        (
            {"run": {**START, "rows": {"train": {"rows": "x"}}}},
            "run.json: rows.train.rows: must be an integer",
        ),
        ({"run": {**START, "rows": {"train": {}}}}, "run.json: rows.train.rows: is missing"),
        ({"summary": {"metric": 3}}, "summary.json: metric: must be a string, is 3 (int)"),
        ({"summary": {"metric": "loss"}}, "summary.json: steps: is missing"),
        (
            {"summary": None, "result": {**RESULT, "metric": "f2"}},
            "result.json: metric: must be one of the test metrics (loss), is 'f2'",
        ),
        (
            {"summary": None, "result": {**RESULT, "forgetting": {"measure": "loss"}}},
            "result.json: forgetting.before: is missing",
        ),
        (
            {"summary": None, "before": {"figures": {"loss": "low"}}},
            "before.json: figures['loss']: must be a number, is 'low'",
        ),
        (
            {"samples": [{**SAMPLE, "tuned": 3}]},
            "samples.jsonl, line 1: must have the texts prompt, expected, base, tuned",
        ),
        ({"config": {"model": {"pth": "x"}}}, "config.json: config.model.pth: no such option"),
    ],
)
def test_a_file_that_was_edited_is_named_with_the_field(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str], parts: dict[str, Any], said: str
) -> None:
    folder = write_run(**parts)
    assert f"{folder}/{said}" in refused(capsys, "--run", str(folder))


def test_files_that_are_not_json_are_named(
    write_run: WriteRun, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run()
    (folder / "summary.json").write_text("{")
    assert f"{folder}/summary.json:1:2: not JSON" in refused(capsys, "--run", str(folder))


def test_it_works_without_jax(write_run: WriteRun) -> None:
    check = (
        "import sys; from jaxpeft.report.__main__ import main; code = main(sys.argv[1:]);"
        " print([m for m in ('jax', 'flax', 'torch', 'transformers') if m in sys.modules]);"
        " sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check, "--run", str(write_run())],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
