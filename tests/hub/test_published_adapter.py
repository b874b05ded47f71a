"""The LoRA adapter of RoBERTa-base on MNLI that its authors published."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.methods.lora import LoRA
from tests.hub.helpers import assert_bit_equal, peft_load
from tests.models.conftest import Reference, make_batch

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def published(assets):
    """The file, a pickle of torch, under the names of loralib."""
    file = assets / "roberta-base-lora-mnli" / "roberta_base_lora_mnli.bin"
    if not file.is_file():
        pytest.skip(f"{file} is absent: the shared test assets do not hold it")
    return file


@pytest.mark.slow
def test_the_adapter_that_microsoft_published_for_mnli_goes_both_ways(published, tmp_path):
    """RoBERTa-base on MNLI by the authors of LoRA: loralib's names and numbers, on a base with few words and thin MLPs."""
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    numbers = {n: t.numpy() for n, t in torch.load(published, map_location="cpu", weights_only=True).items()}
    assert len(numbers) == 52 and sum(t.size for t in numbers.values()) == 887_811
    sizes = {"vocab_size": 99, "intermediate_size": 64, "max_position_embeddings": 40, "type_vocab_size": 1}
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(num_labels=3, **sizes)).eval()
    base.save_pretrained(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {f"base_model.model.{name}{'.weight' * ('lora_' in name)}": t for name, t in numbers.items()}
    save_file(tensors, folder / WEIGHTS)
    config = {"peft_type": "LORA", "task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "modules_to_save": ["classifier"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["query", "value"]}))

    model, params = jaxpeft.load(tmp_path / "base", task="sequence_classification", scan_layers=True)
    method, params = jaxpeft.load_adapter(folder, model, params)
    assert method == LoRA(rank=8, alpha=16.0, targets=("query", "value"))
    jaxpeft.save_adapter(tmp_path / "again", method, params, model)
    assert_bit_equal(load_file(tmp_path / "again" / WEIGHTS), tensors)
    batch = make_batch("right")
    ours = np.asarray(jax.jit(lambda ids, mask: jaxpeft.apply(model, params, ids, mask))(batch.ids, batch.mask))
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        adapted = peft_load(tmp_path / "base", "sequence_classification", tmp_path / "again")
    theirs = Reference(None, "sequence_classification", adapted)(batch)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - Reference(None, "sequence_classification", base)(batch)).max() > 0.1


def test_the_published_file_itself_is_a_pickle_and_is_refused(published, save, no_unpickling):
    saved = save()
    shutil.copy(published, saved.folder / WEIGHTS)
    assert "a pickle or zip file under another name" in saved.problems()[0]
