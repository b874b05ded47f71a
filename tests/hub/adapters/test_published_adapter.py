"""The LoRA adapter of RoBERTa-base on MNLI that its authors published."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.methods.lora import LoRA
from tests.conftest import ROOT
from tests.hub.helpers import assert_bit_equal, peft_load, torch_base
from tests.models.conftest import Reference, forward, make_batch

WEIGHTS, SEQUENCE = "adapter_model.safetensors", "sequence_classification"


@pytest.fixture
def published(assets):
    """The file, a pickle of torch, under the names of loralib."""
    file = assets / "roberta-base-lora-mnli" / "roberta_base_lora_mnli.bin"
    if not file.is_file():
        pytest.skip(f"{file} is absent: the shared test assets do not hold it")
    return file


def few_words(folder):
    """Save a RoBERTa-base with few words and thin MLPs: its attention and its head are those that
    the adapter is for.
    """
    import torch
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes = {
        "vocab_size": 99,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "type_vocab_size": 1,
    }
    torch.manual_seed(0)
    base = RobertaForSequenceClassification(RobertaConfig(num_labels=3, **sizes)).eval()
    base.save_pretrained(folder)
    return base


@pytest.mark.slow
def test_the_adapter_that_microsoft_published_for_mnli_goes_both_ways(published, tmp_path):
    """RoBERTa-base on MNLI by the authors of LoRA: loralib's names and numbers, on a base with few
    words and thin MLPs.
    """
    import torch

    numbers = {
        n: t.numpy()
        for n, t in torch.load(published, map_location="cpu", weights_only=True).items()
    }
    assert len(numbers) == 52 and sum(t.size for t in numbers.values()) == 887_811
    base = few_words(tmp_path / "base")
    folder = tmp_path / "adapter"
    folder.mkdir()
    tensors = {
        f"base_model.model.{name}{'.weight' * ('lora_' in name)}": t for name, t in numbers.items()
    }
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "r": 8,
        "lora_alpha": 16,
        "modules_to_save": ["classifier"],
    }
    (folder / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": ["query", "value"]})
    )

    model, params = jaxpeft.load(
        tmp_path / "base", task="sequence_classification", scan_layers=True
    )
    method, params = jaxpeft.load_adapter(folder, model, params)
    assert method == LoRA(rank=8, alpha=16.0, targets=("query", "value"))
    jaxpeft.save_adapter(tmp_path / "again", method, params, model)
    assert_bit_equal(load_file(tmp_path / "again" / WEIGHTS), tensors)
    batch = make_batch("right")
    ours = np.asarray(forward(model, params, batch.ids, batch.mask))
    adapted = peft_load(tmp_path / "base", "sequence_classification", tmp_path / "again")
    theirs = Reference(None, "sequence_classification", adapted)(batch)
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert np.abs(theirs - Reference(None, "sequence_classification", base)(batch)).max() > 0.1


def test_the_published_file_itself_is_a_pickle_and_is_refused(published, save, no_unpickling):
    saved = save()
    shutil.copy(published, saved.folder / WEIGHTS)
    assert "a pickle or zip file under another name" in saved.problems()[0]


@pytest.mark.slow
def test_it_is_converted_by_the_documented_command_and_merged_for_transformers(published, tmp_path):
    page = (ROOT / "docs" / "adapters.md").read_text()
    (command,) = (
        block for block in re.findall(r"```bash\n(.*?)```", page, re.S) if published.name in block
    )
    shutil.copy(published, tmp_path)
    command = command.replace("python - ", f"{sys.executable} - ")
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, timeout=200)
    few_words(tmp_path / "base")
    report = export(
        ExportRequest(
            tmp_path / "my_adapter", "merged", tmp_path / "merged", base=str(tmp_path / "base")
        )
    )
    assert report.error == 0 and report.gap < 1e-4
    merged, adapted = (
        torch_base(tmp_path / "merged", SEQUENCE),
        peft_load(tmp_path / "base", SEQUENCE, tmp_path / "my_adapter"),
    )
    ours, theirs = (
        Reference(None, SEQUENCE, model)(make_batch("right")) for model in (merged, adapted)
    )
    assert np.abs(ours - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.slow
def test_a_pickle_of_peft_is_converted_by_the_documented_command(save, tmp_path, no_unpickling):
    import torch
    from safetensors.torch import load_file as load_torch

    saved = save()
    tensors = load_torch(saved.folder / WEIGHTS)
    torch.save(
        {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in tensors.items()},
        saved.folder / "adapter_model.bin",
    )
    (saved.folder / WEIGHTS).unlink()
    assert "adapter_model.bin, a pickle, which is never read" in saved.problems()[0]
    page = (ROOT / "docs" / "adapters.md").read_text()
    (command,) = (
        block
        for block in re.findall(r"```bash\n(.*?)```", page, re.S)
        if "adapter_model.bin" in block
    )
    command = command.replace("my_adapter", saved.folder.name).replace(
        "python ", f"{sys.executable} "
    )
    subprocess.run(["bash", "-c", command], cwd=saved.folder.parent, check=True, timeout=200)
    assert_bit_equal(saved.load()[1], saved.params)
