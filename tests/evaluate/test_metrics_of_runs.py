"""The command finds the metrics that a run has found on the same rows, without being told anything
but the adapter.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix

from tests.train.runs import LABELS

KINDS = (
    "single",
    "answers",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in ("regression", "tags", "multi", "text")
    ),
)


@pytest.mark.parametrize("kind", KINDS)
def test_metrics_are_those_of_the_run(kind, trained, evaluate):
    run = trained(kind)
    found, shown = evaluate("--adapter", run.folder, "--data", run.rows)
    values = {name: one["value"] for name, one in found["metrics"].items()}
    wanted = {name: value for name, value in run.result.test.items() if name in values}
    assert len(wanted) >= 2
    assert {name: values[name] for name in wanted} == pytest.approx(wanted, rel=1e-5)
    for name, one in found["metrics"].items():
        assert one["low"] <= one["value"] + 1e-9 or name == "ece"
        assert f"{one['value']:.4f}" in shown
    assert found["data"]["rows"] == len(found["rows"]) == len(run.rows.read_text().splitlines())
    assert found["against"] is None and found["paired"] is None and found["changed"] == []


def test_the_json_has_the_rows_from_which_the_metrics_follow(trained, evaluate):
    run = trained("single")
    found, shown = evaluate("--adapter", run.folder / "adapter", "--data", run.rows)
    rows = found["rows"]
    true, predicted = ([row[name] for row in rows] for name in ("truth", "prediction"))
    assert found["metrics"]["accuracy"]["value"] == pytest.approx(accuracy_score(true, predicted))
    losses = [row["scores"]["loss"] for row in rows]
    assert found["metrics"]["loss"]["value"] == pytest.approx(np.mean(losses))
    assert [row["scores"]["probability"] for row in rows] == pytest.approx(
        np.exp(-np.array(losses))
    )
    assert found["worst"] == np.argsort(-np.array(losses), kind="stable").tolist()
    labels = found["confusion"]["labels"]
    assert sorted(labels) == sorted(LABELS)
    assert found["confusion"]["counts"] == confusion_matrix(true, predicted, labels=labels).tolist()
    report = classification_report(true, predicted, output_dict=True, zero_division=0)
    for one in found["classes"]:
        assert one["f1"] == pytest.approx(report[one["label"]]["f1-score"])
    assert sum(found["calibration"]["counts"]) == len(rows)
    assert found["bootstrap"] == {"resamples": 50, "level": 0.95, "seed": 0, "kind": "percentile"}
    assert rows[0]["where"].endswith("test.jsonl:1:1 (row 1)")
    assert "true \\ predicted" in shown and "worst rows, by loss:" in shown


@pytest.mark.slow
def test_a_limit_samples_rows_by_the_seed(trained, evaluate):
    run = trained("single")
    one, again, other = (
        [
            row["where"]
            for row in evaluate(
                "--adapter", run.folder, "--data", run.rows, "--limit=7", f"--seed={seed}"
            )[0]["rows"]
        ]
        for seed in (0, 0, 1)
    )
    assert len(one) == 7
    assert one == again != other


def test_the_batch_size_does_not_matter(trained, evaluate):
    run = trained("answers")
    found = [
        evaluate("--adapter", run.folder, "--data", run.rows, f"--batch-size={size}")[0]["rows"]
        for size in (3, 64)
    ]
    first, second = ([row["scores"]["loss"] for row in rows] for rows in found)
    assert first == pytest.approx(second, rel=1e-5)


def test_metrics_can_be_chosen(trained, evaluate):
    run = trained("single")
    found, _ = evaluate("--adapter", run.folder, "--data", run.rows, "--metrics", "mcc,accuracy")
    assert list(found["metrics"]) == ["mcc", "accuracy"]


@pytest.mark.slow
def test_plots_are_written(trained, evaluate, tmp_path):
    run = trained("single")
    _, shown = evaluate("--adapter", run.folder, "--data", run.rows, "--plot", tmp_path / "plots")
    for name in ("reliability.png", "confusion.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
        assert name in shown


@pytest.mark.slow
def test_thresholds_are_chosen_on_other_rows(trained, evaluate):
    run = trained("multi")
    found, shown = evaluate(
        "--adapter",
        run.folder,
        "--data",
        run.rows,
        "--thresholds",
        run.folder.parent / "train.jsonl",
    )
    plain, _ = evaluate("--adapter", run.folder, "--data", run.rows)
    assert sorted(found["thresholds"]) == sorted(LABELS)
    assert found["metrics"]["f1_macro"]["value"] > plain["metrics"]["f1_macro"]["value"]
    assert "thresholds, chosen on" in shown


def test_bits_per_byte_count_the_text_of_the_answers(trained, evaluate):
    run = trained("answers")
    found, _ = evaluate("--adapter", run.folder, "--data", run.rows)
    answers = [line.split(" word9 ")[1].split('"')[0] for line in run.rows.read_text().splitlines()]
    # each answer's tokens are its words and [SEP], which has no text; a space is in front
    loss = found["metrics"]["loss"]["value"] * sum(len(one.split()) + 1 for one in answers)
    sizes = sum(len(one) + 1 for one in answers)
    assert found["metrics"]["bits_per_byte"]["value"] == pytest.approx(loss / math.log(2) / sizes)
