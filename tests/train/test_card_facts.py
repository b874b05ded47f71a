"""What a run says in its adapter's model card: no path of this machine, and the metrics it found."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard

from tests.train.runs import Finished


def test_the_card_of_a_run_has_its_metrics_and_no_path(finished: Finished) -> None:
    config, result = finished.config, finished.result
    file = finished.folder / "adapter" / "README.md"
    card = ModelCard.load(file)
    assert str(finished.folder.parent) not in file.read_text()
    assert str(Path(config.model.path).parent) not in file.read_text()
    assert card.data.base_model == Path(config.model.path).name
    found = {one.metric_type: one.metric_value for one in card.data.eval_results}
    assert found == {name: round(value, 4) for name, value in result.test.items()}
    assert {one.dataset_name for one in card.data.eval_results} == {"single.jsonl"}
    assert {one.dataset_split for one in card.data.eval_results} == {"validation"}
    assert (
        "on single.jsonl" in card.text and "| metric | before training | validation |" in card.text
    )
    assert "After 62 steps of 8 rows with seed 5." in card.text
    assert card.data.datasets is None
