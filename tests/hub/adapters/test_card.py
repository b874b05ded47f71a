"""Model cards: the Hub reads their metadata, their code loads the adapter, and nothing of this
machine is in them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from huggingface_hub import ModelCard

import jaxpeft
from jaxpeft.hub.adapters.card import Training
from jaxpeft.hub.sources import PACKAGED, is_local, public_name
from tests.hub.helpers import METHOD, trained
from tests.train.runs import write_tokenizer

SEQUENCE = "sequence_classification"
IDS = np.array([[2, 7, 9, 3]])
TRAINING = Training(
    datasets=["org/questions"],
    rows=["org/questions", "more.jsonl"],
    evaluated="mine.jsonl",
    split="test",
    metrics={"loss": 0.25, "accuracy": 0.91234},
    before={"loss": 1.5, "accuracy": 0.1},
    length="102 steps of 32 rows with seed 0",
    command="python -m jaxpeft.train --config config.json",
)


def code_of(card: str, library: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (found,) = (
        block for block in blocks if block.startswith((f"from {library} ", f"import {library}\n"))
    )
    return found


def test_the_hub_reads_the_base_the_data_and_the_metrics(save, tmp_path):
    saved = save(labels=("no", "maybe", "yes"))
    hub = saved.model.clone(
        source=type(saved.model.source)("org/base", saved.model.source.folder, "a" * 40)
    )
    folder = tmp_path / "card"
    jaxpeft.save_adapter(
        folder, METHOD, saved.params, hub, labels=("no", "maybe", "yes"), training=TRAINING
    )
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.library_name) == ("org/base", "peft")
    assert (card.data.pipeline_tag, card.data.tags) == ("text-classification", ["jaxpeft", "lora"])
    assert card.data.datasets == ["org/questions"]
    assert card.data.language is card.data.license is None
    found = {one.metric_type: one for one in card.data.eval_results}
    assert {name: one.metric_value for name, one in found.items()} == {
        "loss": 0.25,
        "accuracy": 0.9123,
    }
    assert (found["loss"].dataset_split, found["loss"].task_type) == ("test", "text-classification")
    assert found["loss"].dataset_name == "mine.jsonl"
    assert "| accuracy | 0.1000 | 0.9123 |" in card.text
    assert f"revision={'a' * 40!r}" in card.text
    assert "* method: lora(targets=('query', 'value'), rank=4, alpha=6.0)" in card.text
    assert TRAINING.command in card.text


def test_without_training_it_has_no_metrics_and_a_folder_is_named_by_its_last_component(save):
    saved = save()
    text = (saved.folder / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == Path(saved.model.source.name).name
    assert card.data.eval_results is card.data.datasets is None
    assert str(saved.model.source.folder.parent) not in text
    assert "## Results" not in text


@pytest.mark.parametrize(
    ("kind", "task"), [("bert", SEQUENCE), ("llama", "causal_lm"), ("bert", "token_classification")]
)
@pytest.mark.representatives("bert-sequence*")
def test_its_code_loads_the_adapter_in_both_libraries(save, kind, task, tmp_path, capsys):
    import torch

    write_tokenizer(tmp_path / "tokenizer")
    saved = save(METHOD if kind == "bert" else jaxpeft.LoRA(), kind, task)
    text = (saved.folder / "README.md").read_text()
    base = str(saved.model.source.folder)
    names: dict[str, Any] = {}
    for library in ("peft", "jaxpeft"):
        code = code_of(text, library).replace("path/to/this/folder", str(saved.folder))
        code = code.replace("model.source.folder", repr(str(tmp_path / "tokenizer")))
        exec(code.replace(f"path/to/{Path(base).name}", base), names)
        if library == "peft":
            with torch.no_grad():
                model = names["model"].eval()
                wanted = model(input_ids=torch.tensor(IDS)).logits.numpy()
    ours = jaxpeft.apply(names["model"], names["params"], IDS, np.ones_like(IDS))
    np.testing.assert_allclose(ours, wanted, atol=1e-4)
    shown = capsys.readouterr().out  # the first output
    assert shown.strip() if task == "causal_lm" else "LABEL_" in shown


def test_its_code_reads_the_tokenizer_of_the_folder(save, tmp_path):
    saved, folder = save(), tmp_path / "with tokenizer"
    assert "from_pretrained(model.source.folder)" in (saved.folder / "README.md").read_text()
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    jaxpeft.save_adapter(folder, METHOD, saved.params, saved.model, tokenizer=tokenizer)
    card = (folder / "README.md").read_text()
    assert "AutoTokenizer.from_pretrained('path/to/this/folder')" in card


def test_pooling_that_only_jaxpeft_knows_makes_it_the_library(save):
    card = ModelCard.load(save(pooling="mean").folder / "README.md")
    assert card.data.library_name == "jaxpeft"
    assert "from peft import" not in card.text and "import jaxpeft" in card.text


def test_hostile_labels_and_names_are_text(save, tmp_path):
    saved = save(labels=("a\n# not a heading", "<script>x</script>", "b|c"))
    text = (saved.folder / "README.md").read_text()
    assert "outputs, in order: a # not a heading, &lt;script&gt;x&lt;/script&gt;, b\\|c" in text
    hostile = Training(
        ["o/r\nlicense: mit"], ["x: [\n---"], "y: {", "test", {"loss": 1.0}, {}, "1", "c"
    )
    params = trained(METHOD, saved.params)
    jaxpeft.save_adapter(tmp_path / "other", METHOD, params, saved.model, training=hostile)
    card = ModelCard.load(tmp_path / "other" / "README.md")
    assert card.data.license is None
    assert card.data.datasets == ["o/r\nlicense: mit"]


def test_names_of_bases_say_nothing_of_this_machine(tmp_path, monkeypatch):
    (package,) = PACKAGED
    packaged = f"/some/where/{PACKAGED[package].folder}"
    assert public_name(packaged) == public_name(f"package:{package}") == package
    assert public_name("org/name") == "org/name" and not is_local("org/name")
    assert public_name("/home/someone/models/mine/") == "mine"
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert public_name("models/mine") == "mine" and is_local("models/mine")
    monkeypatch.chdir(tmp_path / "models" / "mine")
    assert public_name(".") == "mine"
