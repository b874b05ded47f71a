"""What cannot be evaluated is refused, with the fix."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jaxpeft.command.parser import read_arguments
from jaxpeft.evaluate.__main__ import ARGUMENTS, main


def refusal(words, capsys):
    assert main([str(word) for word in words]) == 2
    return capsys.readouterr().err


def test_problems_of_the_command_line_are_listed(capsys):
    error = refusal(["--columns=label"], capsys)
    assert "--data: is required; give a file of rows" in error
    assert "--adapter: is required without --model; see --help" in error
    assert "--columns: 'label' must be FIELD=COLUMN, such as label=category" in error


def test_a_comparison_with_the_base_needs_an_adapter(tiny_models, capsys, tmp_path):
    words = ["--model", tiny_models["llama"], "--data", "x.jsonl", "--against=base", "--general=y"]
    error = refusal(words, capsys)
    assert "--against base: compares an adapter with its base; set --adapter" in error
    assert "--general: compares an adapter with its base; set --adapter" in error


def test_code_runs_only_if_it_is_allowed(capsys):
    words = ["--adapter=a", "--data=x.jsonl", "--metrics=code_passes"]
    assert "allow it with --run-code answer" in refusal(words, capsys)


def test_an_output_in_an_absent_folder_is_refused_first(capsys):
    words = ["--adapter=a", "--data=x.jsonl", "--json=nowhere/out.json"]
    assert "--output nowhere/out.json: " in (shown := refusal(words, capsys))
    assert "/nowhere is not a folder; create it" in shown
    words = ["--adapter=x", "--data=y", "--json=.", f"--plot={Path(__file__)}"]
    shown = refusal(words, capsys)
    assert "--output .: is a folder; give the name of a file" in shown
    assert f"--plot {Path(__file__)}: is a file; choose a new folder" in shown


def test_a_metric_of_another_task_is_refused(trained, evaluate):
    run = trained("single")
    error = evaluate("--adapter", run.folder, "--data", run.rows, "--metrics=acuracy", fails=True)
    assert (
        "--metrics: 'acuracy' is not a metric of classification; did you mean 'accuracy'?" in error
    )
    error = evaluate("--adapter", run.folder, "--data", run.rows, "--metrics=rougeL", fails=True)
    assert "'rougeL' is not a metric of classification" in error


def test_options_of_other_problems_are_refused(trained, evaluate):
    run = trained("single")
    common = ("--adapter", run.folder, "--data", run.rows)
    error = evaluate(*common, "--thresholds", run.rows, fails=True)
    assert "--thresholds: is for multi-label classification" in error
    error = evaluate(*common, "--general", run.rows, fails=True)
    assert "--general: is for language models, not classification; omit it" in error
    error = evaluate(*common, "--run-code=answer", fails=True)
    assert "--run-code: is for language models, not classification; omit it" in error


def test_texts_without_answers_have_no_text_metrics(trained, evaluate):
    run = trained("answers")
    error = evaluate(
        "--adapter", run.folder, "--data", run.rows, "--separator=", "--metrics=rougeL", fails=True
    )
    assert "have format text, which has no answers to generate" in error


def test_an_unknown_label_names_its_row(trained, evaluate, tmp_path):
    run = trained("single")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "word1", "label": "red"}\n{"text": "word2", "label": "violet"}\n')
    error = evaluate("--adapter", run.folder, "--data", rows, fails=True)
    assert "rows.jsonl:2:1 (row 2)" in error and "'violet'" in error


def test_columns_can_be_named(trained, evaluate, tmp_path):
    run = trained("single")
    rows = tmp_path / "rows.jsonl"
    lines = [json.loads(line) for line in run.rows.read_text().splitlines()]
    renamed = [{"phrase": line["text"], "hue": line["label"]} for line in lines]
    rows.write_text("".join(json.dumps(line) + "\n" for line in renamed))
    found, _ = evaluate(
        "--adapter", run.folder, "--data", rows, "--columns", "text=phrase,label=hue"
    )
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(run.result.test["accuracy"])


def test_recorded_options_are_checked(trained, evaluate, tmp_path):
    import shutil

    run = trained("single")
    adapter = tmp_path / "adapter"
    shutil.copytree(run.folder / "adapter", adapter)
    file = adapter / "jaxpeft.json"
    content = json.loads(file.read_text())
    assert content["data"] == {"max_length": 16}
    file.write_text(json.dumps(content | {"data": {"max_length": -3}}))
    error = evaluate("--adapter", adapter, "--data", run.rows, fails=True)
    assert "data.max_length: must be at least 2, is -3" in error
    assert "data options are recorded in the adapter's jaxpeft.json" in error
    # no other option may come from an adapter, which could name a file
    file.write_text(json.dumps(content | {"data": {"chat_template": "/etc/passwd"}}))
    error = evaluate("--adapter", adapter, "--data", run.rows, fails=True)
    assert "data: must be an object of format, columns, encoding" in error
    # an older version recorded none
    del content["data"]
    file.write_text(json.dumps(content))
    found, _ = evaluate("--adapter", adapter, "--data", run.rows, "--max-length=16")
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(run.result.test["accuracy"])


def test_the_separator_is_unescaped():
    from jaxpeft.evaluate.__main__ import _data_options

    args, _ = read_arguments(ARGUMENTS, ["--data=x", "--adapter=a", r"--separator=\nA: "])
    assert _data_options(args) == {"separator": "\nA: "}


def test_there_is_nothing_to_plot_for_a_language_model(trained, evaluate, tmp_path):
    run = trained("answers")
    words = ("--adapter", run.folder, "--data", run.rows, "--plot", tmp_path / "plots")
    said = "--plot: there is nothing to plot for language models; omit it"
    assert said in evaluate(*words, fails=True)


@pytest.mark.parametrize("kind", ["answers", "single"])
def test_metrics_are_checked_before_the_base_is_read(trained, evaluate, kind):
    # a base that does not exist would be refused later
    run, gone = trained(kind), ("--model", "/gone")
    words = ("--adapter", run.folder, "--data", run.rows, *gone, "--metrics=pearson")
    what = {"answers": "language models", "single": "classification"}[kind]
    assert f"'pearson' is not a metric of {what}" in evaluate(*words, fails=True)
