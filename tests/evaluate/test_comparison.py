"""An adapter against its base, a constant answer, or another adapter, on the same rows."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.numpy import load_file, save_file
from scipy.stats import binomtest

from jaxpeft.hub.sources import file_sha256


def test_a_language_model_is_compared_with_its_base(trained, evaluate):
    run = trained("answers")
    found, shown = evaluate("--adapter", run.folder, "--data", run.rows, "--against", "base")
    loss = found["metrics"]["loss"]
    assert loss["difference"]["value"] == pytest.approx(loss["value"] - loss["against"]["value"])
    assert loss["difference"]["high"] < 0
    assert loss["p"] == pytest.approx(2 / 51)
    own, other = (
        [row["scores"]["loss"] for row in rows]
        for rows in (found["rows"], [row["against"] for row in found["rows"]])
    )
    wins = sum(a < b for a, b in zip(own, other, strict=True))
    assert found["paired"]["wins"]["loss"]["wins"] == wins
    assert found["paired"]["wins"]["loss"]["p"] == pytest.approx(binomtest(wins, 20).pvalue)
    assert found["against"].startswith("base ") and found["notes"] == []
    assert "loss by row: better in" in shown
    # the base alone has the same loss
    base, _ = evaluate(
        "--model", _base(run), "--data", run.rows, "--separator", " word9 ", "--max-length=16"
    )
    assert base["metrics"]["loss"]["value"] == pytest.approx(loss["against"]["value"])


def _base(run):
    return json.loads((run.folder / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ]


@pytest.mark.slow
def test_a_classifier_whose_base_has_no_head_is_compared_with_a_constant(trained, evaluate):
    run = trained("single")
    found, shown = evaluate("--adapter", run.folder, "--data", run.rows, "--against", "base")
    assert found["against"] == "the best constant answer"
    assert "has no trained head for this task" in found["notes"][0]
    assert found["notes"][0] in shown
    accuracy = found["metrics"]["accuracy"]
    assert accuracy["against"]["value"] == pytest.approx(14 / 40)  # the most frequent class
    # what says nothing against a constant is left out
    assert found["paired"]["mcnemar"] == {} and found["changed"] == []
    assert found["paired"]["wins"].keys() == {"loss"}
    assert "against" not in found["metrics"]["ece"]
    assert "predictions differ" not in shown and "McNemar" not in shown
    assert "constant answer" in shown and "< 0.04  better" in shown


@pytest.mark.slow
def test_two_adapters_are_compared_by_row(trained, evaluate, tmp_path):
    run = trained("single")
    other = tmp_path / "other"
    shutil.copytree(run.folder / "adapter", other)
    weights = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: -one if "classifier" in name else one for name, one in weights.items()},
        other / "adapter_model.safetensors",
    )
    settings = json.loads((other / "jaxpeft.json").read_text())
    del settings["sha256"]
    (other / "jaxpeft.json").write_text(json.dumps(settings))
    found, shown = evaluate("--adapter", run.folder, "--data", run.rows, "--against", other)
    accuracy, table = found["metrics"]["accuracy"], found["paired"]["mcnemar"]["accuracy"]
    assert sum(table[name] for name in ("both", "only_own", "only_other", "neither")) == 40
    assert accuracy["difference"]["value"] == pytest.approx(
        (table["only_own"] - table["only_other"]) / 40
    )
    differ = [
        i
        for i, row in enumerate(found["rows"])
        if row["prediction"] != row["against"]["prediction"]
    ]
    assert found["changed"] == differ and differ
    assert f"{len(differ)} of 40 predictions differ" in shown
    assert f"    {other.parent.name}/other: " in shown
    folder = run.folder / "adapter"
    assert found["adapter"] == {
        "path": str(folder),
        "sha256": {"adapter_model.safetensors": file_sha256(folder / "adapter_model.safetensors")},
    }


@pytest.mark.slow
def test_an_adapter_equals_itself(trained, evaluate):
    run = trained("single")
    found, _ = evaluate("--adapter", run.folder, "--data", run.rows, "--against", run.folder)
    for one in found["metrics"].values():
        assert one["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert one["p"] == 1.0
    assert found["changed"] == []
    assert found["paired"]["mcnemar"]["accuracy"]["p"] == 1.0


@pytest.mark.slow
def test_an_adapter_of_another_problem_is_refused(trained, evaluate):
    one, other = trained("single"), trained("regression")
    error = evaluate(
        "--adapter", one.folder, "--data", one.rows, "--against", other.folder, fails=True
    )
    assert "was trained with problem_type 'regression', but" in error
    assert "with 'single_label_classification'; compare adapters of one task" in error


@pytest.mark.slow
def test_generated_answers_are_compared(trained, evaluate):
    run = trained("answers")
    found, shown = evaluate(
        "--adapter", run.folder, "--data", run.rows, "--against", "base",
        "--metrics", "exact_match,rougeL,chrf", "--max-new-tokens=4",
    )  # fmt: skip
    assert list(found["metrics"]) == ["exact_match", "rougeL", "chrf"]
    matches = [row["prediction"].split() == row["truth"].split() for row in found["rows"]]
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(sum(matches) / 20)
    assert [row["scores"]["exact_match"] for row in found["rows"]] == matches
    assert found["paired"]["mcnemar"].keys() == {"exact_match"}
    assert found["generation"]["max_new_tokens"] == 4
    assert "sentence_chrf by row" in shown
