"""The page of a run: its content, escaping, and runs that lack parts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jaxpeft.config import load
from jaxpeft.config.schema import Config
from jaxpeft.report import run_folder, run_page
from jaxpeft.report.__main__ import main
from jaxpeft.report.base_title import base_title
from jaxpeft.train import job
from tests.report.conftest import SAMPLE, START, WriteRun, step_lines
from tests.report.pages import Page

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)> & {{ 7 * 7 }}"


def page(folder: Path) -> Page:
    return Page(run_page.html(run_folder.read(folder)))


@pytest.mark.slow
def test_a_run_leaves_what_its_page_shows(
    make_config: Callable[..., Config], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_config(optimizer__head_learning_rate=0.1, evaluation__every_steps=3)
    folder = tmp_path / "run"
    result = job.run(config, folder)
    assert main(["--run", str(folder)]) == 0
    assert capsys.readouterr().out == f"wrote {folder / 'report.html'}\n"
    found = Page((folder / "report.html").read_text())
    text = found.text
    assert found.headings[0] == f"lora on {Path(config.model.path).name}"
    assert f"{result.test['accuracy']:.4f} validation accuracy" in text
    assert f"{result.trainable_parameters:,} of {result.total_parameters:,} parameters" in text
    assert "into 3 classes" in text and "(48 rows): 6 steps" in text
    assert "red, green, blue" in text or "blue, green, red" in text
    chart = next(svg for svg in found.of("svg") if "aria-label" in svg)
    assert str(chart["aria-label"]).startswith("loss by step: training from ")
    start = json.loads((folder / "run.json").read_text())
    for value in (start["base_sha256"], *start["data"]["sources"].values()):
        assert value in text
    # the command is that of the same run
    (command,) = re.findall(r"--config (\S+) --workdir runs/again", text)
    assert load(command) == config
    assert f"read_settings('{folder}/adapter')" in text


@pytest.mark.slow
def test_a_language_model_answers_test_rows_before_and_after(
    make_config: Callable[..., Config], tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "word1 word2", "completion": "word3 word4"}
    rows.write_text("".join(json.dumps(row) + "\n" for _ in range(40)))
    config = make_config(
        "text", data__train=str(rows), evaluation__samples=2, evaluation__sample_tokens=4
    )
    folder = tmp_path / "run"
    job.run(config, folder)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 2
    assert {key: samples[0][key] for key in ("prompt", "expected")} == {
        "prompt": "word1 word2",
        "expected": "word3 word4",
    }
    assert samples[0]["base"] != samples[0]["tuned"]
    text = page(folder).text
    assert samples[0]["base"] in text and samples[0]["tuned"] in text


def test_the_page_needs_nothing_else(write_run: WriteRun) -> None:
    html = run_page.html(run_folder.read(write_run(samples=[SAMPLE])))
    found = Page(html)
    assert not found.of("script") and not found.of("link") and not found.of("img")
    assert not re.search(r"https?://|@import|url\(", html)
    assert any("default-src 'none'" in str(meta.get("content")) for meta in found.of("meta"))
    assert not [name for _, attrs in found.tags for name in attrs if name.startswith("on")]
    assert all("aria-label" in svg or svg.get("aria-hidden") == "true" for svg in found.of("svg"))
    assert "prefers-color-scheme: dark" in html
    assert len(found.of("h1")) == 1
    assert all(region["aria-label"] for region in found.of("div") if region.get("role") == "region")


def test_the_result_comes_first_and_everything_is_there(write_run: WriteRun) -> None:
    found = page(write_run(samples=[SAMPLE]))
    text = found.text
    assert text.index("0.3000 before training → 0.9000 validation accuracy, step 30") < 300
    for part in (
        "40 steps in 61.5 s; 1,200 of 48,000 parameters are trained (2.500 %).",
        "prompt table: people expected SELECT a base (empty) tuned SELECT b",
        "rank 4",
        "8 x tiny",
        "peak memory 1.50 GB",
        "import jaxpeft print('used')",
        "--workdir runs/again",
        "seed (0)",
    ):
        assert part in text, part
    assert [title for title in found.headings if title in TITLES] == list(TITLES)
    labels = [str(svg["aria-label"]) for svg in found.of("svg")]
    assert [label.split(" by step")[0] for label in labels] == [
        "loss",
        "accuracy, validation",
        "learning rate",
        "gradient norm",
        "tokens per second",
    ]
    assert labels[0] == (
        "loss by step: training from 4 at step 1 to 0.1 at step 40; validation from 0.5 at step 10"
        " to 0.125 at step 40"
    )
    assert "Worth knowing" not in text


TITLES = ("Metrics", "Curves", "Samples", "What was trained", "Data", "How to reproduce")


def test_text_of_files_is_never_markup(write_run: WriteRun) -> None:
    sample = dict.fromkeys(SAMPLE, HOSTILE)
    start = {**START, "labels": [HOSTILE, "b", "c"], "environment": {HOSTILE: HOSTILE}}
    folder = write_run(samples=[sample], run=start)
    config = json.loads((folder / "config.json").read_text())
    config["data"] |= {"train": HOSTILE, "separator": ""}
    (folder / "config.json").write_text(json.dumps(config))
    summary = json.loads((folder / "summary.json").read_text())
    own = summary["methods"]["lora"]
    own["validation"] = {"accuracy": 0.5, HOSTILE: 0.1}
    (folder / "summary.json").write_text(json.dumps({**summary, "prediction": HOSTILE}))
    html = run_page.html(run_folder.read(folder))
    found = Page(html)
    assert not found.of("script") and not found.of("img")
    assert "<script" not in html and "<img" not in html
    assert found.text.count(HOSTILE) >= 8
    assert "49" not in found.text


def test_a_run_that_goes_on_says_so_and_how_to_resume_it(write_run: WriteRun) -> None:
    folder = write_run(summary=None, metrics=step_lines(12), before={"figures": {"accuracy": 0.25}})
    found = page(folder)
    text = found.text
    assert "This run has not finished." in text and "12 of 40 steps" in text
    assert f"--config {folder}/config.json --workdir {folder}" in text
    assert "0.2500" in text and "newest, validation" in text and "0.7000" in text
    assert "How to use the adapter" not in found.headings


def test_a_run_of_only_a_config_has_a_page(write_run: WriteRun) -> None:
    text = page(write_run(run=None, summary=None, metrics=[])).text
    for part in (
        "0 steps",
        "No metrics are recorded, so there are no curves.",
        "run.json is missing, so versions, devices and row counts are unknown",
    ):
        assert part in text, part


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (
            [{"step": 3, "skipped": 1}],
            "Steps skipped, because the loss or a gradient was not finite: 3.",
        ),
        (
            [{"step": step, "grad_norm": 0.0} for step in range(1, 11)],
            "Steps whose gradient was exactly 0: 1, 2, 3, 4, 5, 6, 7, 8 and 2 more.",
        ),
        (
            [{"step": 5, "empty": 1, "loss": 0.0}],
            "Steps without labels, so that nothing was trained: 5.",
        ),
        ([{"step": 5, "loss": float("nan")}], "No finite training loss is recorded."),
    ],
)
def test_incidents_are_told(write_run: WriteRun, lines: list[dict[str, Any]], said: str) -> None:
    text = page(write_run(metrics=lines)).text
    assert "Worth knowing" in text and said in text


def test_a_result_that_is_no_gain_an_early_end_and_damage_are_told(write_run: WriteRun) -> None:
    folder = write_run()
    summary = json.loads((folder / "summary.json").read_text())
    summary["before"]["accuracy"] = 0.95
    summary["methods"]["lora"]["steps"] = 20
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "metrics.jsonl.damaged").write_text("{")
    text = page(folder).text
    for part in (
        "The validation accuracy is not better than before training.",
        "Training stopped early, after 20 of 40 steps.",
        "Damaged lines of metrics.jsonl were moved to metrics.jsonl.damaged.",
    ):
        assert part in text, part


def test_a_run_of_a_comparison_has_a_page_with_what_it_forgot(write_run: WriteRun) -> None:
    result = {
        "metric": "accuracy",
        "split": "test",
        "before": None,
        "test": {"accuracy": 0.8},
        "steps": 40,
        "best_step": 40,
        "seconds": 7000,
        "trainable_parameters": 1,
        "total_parameters": 2,
        "forgetting": {"measure": "centroid_accuracy", "before": 0.9, "after": 0.85, "lost": 0.05},
    }
    text = page(write_run(summary=None, result=result)).text
    assert "0.8000 test accuracy, step 40" in text and "40 steps in 1.9 h" in text
    assert "0.9000 for the base, 0.8500 for the tuned model" in text


def test_a_long_curve_is_thinned_and_a_constant_one_is_drawn(write_run: WriteRun) -> None:
    lines = [{"step": step, "loss": 2.0} for step in range(1, 5_001)]
    html = run_page.html(run_folder.read(write_run(metrics=lines)))
    (path,) = re.findall(r'<path d="([^"]*)"', html)
    assert 200 < path.count("L") < 260
    heights = {point.split()[1] for point in path[1:].split("L")}
    assert len(heights) == 1 and 10 < float(heights.pop()) < 190


def test_a_curve_of_one_point_is_visible_and_its_ticks_differ(write_run: WriteRun) -> None:
    html = run_page.html(run_folder.read(write_run(metrics=[{"step": 1, "loss": 4.386}])))
    (figure,) = re.findall(r'<svg viewBox="0 0 360 .*?</svg>', html, re.DOTALL)
    assert figure.count("<circle") == 1
    labels = re.findall(r'text-anchor="end">([^<]*)<', figure)
    assert len(labels) == len(set(labels)) >= 3


def test_a_base_in_a_folder_of_a_generic_name_has_two_components() -> None:
    assert base_title("/data/models/stories260K/hf") == "stories260K/hf"
    assert base_title("/data/models/MiniLM-L6") == "MiniLM-L6"
    assert base_title("org/model") == "org/model"
