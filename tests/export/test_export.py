"""Exports: merged models in the real transformers, adapters in the real peft, and everything that
is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft.errors import AdapterError, ConfigError, ExportError, WeightsError
from jaxpeft.export import merged_model
from jaxpeft.export.export import ExportRequest, export
from jaxpeft.hub import merge_record
from jaxpeft.kernels import QUANTIZED
from tests.export.making import (
    CAUSAL,
    ENCODER,
    LINEAR,
    LORA,
    SEQUENCE,
    TOKENS,
    assert_close,
    ours,
    theirs,
)
from tests.hub.helpers import edit_json, edited, peft_load, peft_save, torch_base
from tests.train.runs import write_tokenizer

DORA = jaxpeft.DoRA(rank=4, alpha=6.0, targets=LINEAR)
IA3 = jaxpeft.IA3(targets=LINEAR, feedforward=r".*(down_proj|\.output\.dense)")
LABELS = ("red", "green", "blue")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------- merged

MERGED = {
    "lora llama": (LORA, "llama", CAUSAL, False),
    "lora llama scanned": (LORA, "llama", CAUSAL, True),
    "lora bert": (LORA, "bert", SEQUENCE, False),
    "lora bert scanned": (LORA, "bert", SEQUENCE, True),
    "lora roberta scanned": (LORA, "roberta", SEQUENCE, True),
    "dora llama scanned": (DORA, "llama", CAUSAL, True),
    "dora bert": (DORA, "bert", SEQUENCE, False),
    "dora roberta": (DORA, "roberta", SEQUENCE, False),
    "ia3 llama": (IA3, "llama", CAUSAL, False),
    "ia3 bert scanned": (IA3, "bert", SEQUENCE, True),
    "ia3 roberta": (IA3, "roberta", SEQUENCE, False),
    "classes of llama": (LORA, "llama", SEQUENCE, False),
    "tokens of distilbert": (LORA, "distilbert", TOKENS, True),
    "hidden states of bert": (LORA, "bert", ENCODER, False),
    "biases": (jaxpeft.BitFit(), "bert", SEQUENCE, False),
    "everything": (jaxpeft.Full(), "llama", CAUSAL, False),
    "methods together": (jaxpeft.Mixed(methods=(LORA, jaxpeft.LNTuning())), "llama", CAUSAL, False),
    "methods at one site": (jaxpeft.Mixed(methods=(LORA, IA3)), "llama", CAUSAL, False),
    "saved modules": (
        jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("embed_tokens",)),
        "llama",
        CAUSAL,
        False,
    ),
}


@pytest.mark.parametrize(("method", "kind", "task", "scan"), MERGED.values(), ids=MERGED)
@pytest.mark.representatives("dora llama scanned", "methods at one site")
def test_transformers_gives_the_logits_of_the_adapter_beside_its_base(
    make, tmp_path, method, kind, task, scan
):
    made = make(method, kind, task, labels=LABELS if "class" in task else (), scan_layers=scan)
    report = made.export(tmp_path / "merged")
    loaded = torch_base(tmp_path / "merged", task)
    assert_close(theirs(task, loaded), made.logits())
    assert np.abs(theirs(task, loaded) - theirs(task, torch_base(made.base, task))).max() > 0.02
    assert report.error == 0 and report.gap < 1e-4
    ours, base = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", made.base)
    )
    assert {name: t.shape for name, t in ours.items()} == {
        name: t.shape for name, t in base.items()
    }
    if "class" in task:
        assert loaded.config.id2label == dict(enumerate(LABELS))
        assert loaded.config.label2id == {label: i for i, label in enumerate(LABELS)}
    assert loaded.config.architectures == [type(loaded).__name__]


@pytest.mark.parametrize(
    ("kind", "task"), [("bert", SEQUENCE), ("llama", SEQUENCE), ("bert", TOKENS)]
)
@pytest.mark.representatives("llama-*")
def test_a_backbone_gets_the_head_that_was_trained_on_it(make, reference, tmp_path, kind, task):
    made = make(LORA, kind, task, base=reference(kind, ENCODER).folder)
    made.export(tmp_path / "merged")
    loaded = torch_base(tmp_path / "merged", task)
    assert_close(theirs(task, loaded), made.logits())
    assert loaded.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}


@pytest.mark.slow
def test_one_output_is_a_regression(make, reference, tmp_path):
    made = make(LORA, base=reference("bert", ENCODER).folder, num_labels=1)
    made.export(tmp_path / "merged")
    assert torch_base(tmp_path / "merged", SEQUENCE).config.problem_type == "regression"


TIED = {
    # the head reads what the adapter does not change: it gets a copy of its own
    "adapted embedding": (jaxpeft.LoRA(targets=("embed_tokens", "q_proj")), False),
    # trained rows are the head's as well
    "trained tokens": (jaxpeft.TrainableTokens(tokens=(5, 17, 97)), True),
    "saved embedding": (jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("embed_tokens",)), True),
}


@pytest.mark.parametrize(("method", "tied"), TIED.values(), ids=TIED)
@pytest.mark.representatives("trained tokens", "saved embedding")
def test_tied_embeddings_stay_tied_where_that_is_the_same(make, tmp_path, method, tied):
    made = make(method, "llama", CAUSAL, switches={"tie_word_embeddings": True}, size=0.5)
    made.export(tmp_path / "merged")
    loaded = torch_base(tmp_path / "merged", CAUSAL)
    assert_close(theirs(CAUSAL, loaded), made.logits())
    assert loaded.config.tie_word_embeddings == tied
    assert ("lm_head.weight" in load_file(tmp_path / "merged" / "model.safetensors")) != tied


@pytest.mark.slow
def test_added_tokens_are_in_the_merged_model(make, tmp_path):
    method = jaxpeft.LoRA(targets=("q_proj",), modules_to_save=("embed_tokens", "lm_head"))
    made = make(method, "llama", CAUSAL, vocab_size=103)
    made.export(tmp_path / "merged")
    loaded = torch_base(tmp_path / "merged", CAUSAL)
    assert loaded.config.vocab_size == 103 and theirs(CAUSAL, loaded).shape[-1] == 103
    assert_close(theirs(CAUSAL, loaded), made.logits())
    # what peft saves tells the number by the embedding alone
    (made.folder / "jaxpeft.json").unlink()
    made.export(tmp_path / "plain", dtype="bfloat16")


@pytest.mark.slow
def test_added_tokens_whose_rows_alone_are_trained_are_in_the_merged_model(make, tmp_path):
    made = make(
        jaxpeft.TrainableTokens(tokens=(99, 102)), "llama", CAUSAL, vocab_size=103, size=1.0
    )
    made.export(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    rows = made.params["model"]["embed_tokens"]["token_rows"]
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"][[99, 102]], rows)
    (made.folder / "jaxpeft.json").unlink()
    text = made.refused(tmp_path / "out", AdapterError)
    assert "load the model with vocab_size=103" in text
    made.export(tmp_path / "out", vocab_size=103)


def test_weights_are_put_into_shards_that_transformers_loads(make, tmp_path):
    made = make(LORA, "llama", CAUSAL)
    made.export(tmp_path / "whole")
    made.export(tmp_path / "shards", shard_bytes=20_000)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    shards = {file: load_file(tmp_path / "shards" / file) for file in files}
    assert all(sum(t.nbytes for t in shard.values()) <= 20_000 for shard in shards.values())
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    assert index["metadata"] == {"total_size": sum(t.nbytes for t in whole.values())}
    for name, tensor in whole.items():
        np.testing.assert_array_equal(shards[index["weight_map"][name]][name], tensor)
    assert_close(theirs(CAUSAL, torch_base(tmp_path / "shards", CAUSAL)), made.logits())


def test_tokenizer_and_generation_config_come_along(make, tmp_path, reference):
    base = shutil.copytree(reference("llama", CAUSAL).folder, tmp_path / "base")
    write_tokenizer(base)
    (base / "generation_config.json").write_text('{"max_new_tokens": 7}')
    (base / "pytorch_model.bin").write_bytes(b"\x80")
    made = make(LORA, "llama", CAUSAL, base=base)
    made.export(tmp_path / "merged")
    assert names(tmp_path / "merged") == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "jaxpeft_merge.json",
    }
    assert torch_base(tmp_path / "merged", CAUSAL).generation_config.max_new_tokens == 7
    (made.folder / "tokenizer_config.json").write_text('{"model_max_length": 5}')
    made.export(tmp_path / "with the adapter's")
    own = json.loads((tmp_path / "with the adapter's" / "tokenizer_config.json").read_text())
    assert own == {"model_max_length": 5}
    made.export(tmp_path / "again", "peft")
    assert "tokenizer_config.json" in names(tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pooling", "own"),
    [
        ("bert", "mean", "pooler"),
        ("bert", "cls", "pooler"),
        ("roberta", "mean", "cls"),
        ("llama", "mean", "last"),
    ],
)
@pytest.mark.representatives("llama-mean-last")
def test_a_pooling_that_transformers_does_not_know_is_refused(make, tmp_path, kind, pooling, own):
    method = jaxpeft.LoRA(targets="all-linear")
    made = make(method, kind, pooling=pooling)
    text = made.refused(tmp_path / "merged")
    assert (
        f"--to merged: the classifier uses pooling={pooling!r}, but transformers uses {own!r} for"
        f" {kind}, so its labels would differ; use it with jaxpeft:"
        f" `python -m jaxpeft.generate --adapter {made.folder} --input FILE`" in text
    )
    assert "; use it with jaxpeft:" in made.refused(tmp_path / "mlx", to="mlx")
    report = made.export(tmp_path / "peft", "peft")  # what it tells of in its place
    assert "transformers" not in report.lines[-1] and "PeftModel" not in report.lines[-1]
    model, params = jaxpeft.load(
        made.base, **jaxpeft.read_settings(tmp_path / "peft").load_options, dtype=jnp.float32
    )
    _, params = jaxpeft.load_adapter(tmp_path / "peft", model, params)
    assert_close(ours(model, params), made.logits())


def test_what_was_merged_is_recorded(make, tmp_path):
    made = make(labels=LABELS)
    report = made.export(tmp_path / "merged")
    record = json.loads((tmp_path / "merged" / "jaxpeft_merge.json").read_text())
    extra = json.loads((made.folder / "jaxpeft.json").read_text())
    assert record["base"] == {
        "name": str(made.base),
        "revision": None,
        "sha256": extra["base_sha256"],
    }
    assert record["adapter"]["method"]["rank"] == 4 and len(record["adapter"]["sha256"]) == 64
    found = {
        key: record[key]
        for key in ("dtype", "task", "relative_error", "base_rounded_to", "earlier")
    }
    assert found == {
        "dtype": "float32",
        "task": SEQUENCE,
        "relative_error": 0.0,
        "base_rounded_to": None,
        "earlier": [],
    }
    assert record["largest_logit_difference"] == report.gap


# -------------------------------------------------------------------------------------------- dtype


@pytest.mark.slow
def test_bfloat16_warns_of_what_it_rounds_off(make, tmp_path, caplog):
    made = make(size=0.005)
    report = made.export(tmp_path / "merged", dtype="bfloat16")
    assert report.error > 0.01
    shown = (
        f"bfloat16 rounds off {100 * report.error:.1f} % of the adapter's change to the weights;"
        " use --dtype float32"
    )
    assert shown in caplog.text
    assert f"{report.error:.2g} of the adapter's change" in report.lines[1]
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {np.dtype(jnp.bfloat16)}
    assert torch_base(tmp_path / "merged", SEQUENCE).config.to_dict()["dtype"] == "bfloat16"


@pytest.mark.slow
def test_the_error_is_that_of_all_changed_weights(make, tmp_path):
    made = make(jaxpeft.LoRA(rank=4, targets=("query", "value")), size=0.02)
    report = made.export(tmp_path / "merged", dtype="bfloat16")
    made.export(tmp_path / "exact", dtype="float32")
    merged, exact, base = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "merged", tmp_path / "exact", made.base)
    )
    changed = [name for name in base if not np.array_equal(base[name], exact[name])]
    assert sorted({name.split(".")[-2] for name in changed}) == ["classifier", "query", "value"]
    error = sum(np.linalg.norm(merged[n].astype(np.float32) - exact[n]) ** 2 for n in changed)
    change = sum(np.linalg.norm(exact[n] - base[n]) ** 2 for n in changed)
    np.testing.assert_allclose(report.error, np.sqrt(error / change), rtol=1e-4)


@pytest.mark.slow
def test_the_base_s_dtype_is_kept_unless_another_is_asked_for(make, tmp_path, reference, caplog):
    def to_bfloat16(tensors):
        tensors.update({name: t.astype(jnp.bfloat16) for name, t in tensors.items()})

    base = edited(reference("bert", SEQUENCE).folder, tmp_path / "base", to_bfloat16)
    made = make(base=base)
    own, wide = made.export(tmp_path / "own"), made.export(tmp_path / "wide", dtype="float32")
    assert {t.dtype for t in load_file(tmp_path / "own" / "model.safetensors").values()} == {
        np.dtype(jnp.bfloat16)
    }
    assert {t.dtype for t in load_file(tmp_path / "wide" / "model.safetensors").values()} == {
        np.dtype(np.float32)
    }
    assert 0 < own.error < 0.01 and wide.error == 0
    assert own.gap > 10 * wide.gap
    assert "rounds off" not in caplog.text
    assert_close(theirs(SEQUENCE, torch_base(tmp_path / "wide", SEQUENCE)), made.logits())


def test_numbers_that_float16_cannot_hold_are_refused(make, tmp_path):
    made = make(jaxpeft.LoRA(rank=4, alpha=1e7, targets=("query",)))
    text = made.refused(tmp_path / "merged", dtype="float16")
    assert "--dtype float16: bert/encoder/layer/0/attention/self/query/kernel overflows" in text
    assert "use bfloat16 or float32" in text


# ------------------------------------------------------------------------------ quantized reference


@pytest.mark.slow
@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_the_base_is_rounded_as_the_adapter_s_was(make, tmp_path, caplog, form):
    """All kernels that were quantized, and not only those that the adapter is on."""
    made = make(jaxpeft.LoRA(rank=4, targets=("query",)), quant=form)
    assert json.loads((made.folder / "jaxpeft.json").read_text())["quant"]["form"] == form
    made.export(tmp_path / "reference", "merged_quantized_reference", dtype="float32")
    made.export(tmp_path / "plain", dtype="float32")
    assert (
        f"the adapter was trained on a base quantized to {form}, but is merged into the"
        " unquantized one" in caplog.text
    )
    rounded, plain, base = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "reference", tmp_path / "plain", made.base)
    )
    linear = [
        name
        for name, tensor in base.items()
        if ("encoder" in name or "pooler" in name) and tensor.ndim == 2
    ]
    assert len(linear) == 13
    for name, tensor in base.items():
        own = (
            QUANTIZED[form].read(QUANTIZED[form].store(jnp.asarray(tensor).T)).T
            if name in linear
            else tensor
        )
        np.testing.assert_allclose(rounded[name], own + plain[name] - tensor, atol=1e-6)
    record = json.loads((tmp_path / "reference" / "jaxpeft_merge.json").read_text())
    assert record["base_rounded_to"] == form
    assert_close(theirs(SEQUENCE, torch_base(tmp_path / "reference", SEQUENCE)), made.logits())


def test_without_a_quantized_base_there_is_nothing_to_round(make, tmp_path):
    text = make().refused(tmp_path / "merged", to="merged_quantized_reference")
    assert "was trained on an unquantized base (jaxpeft.json has no quant)" in text
    assert text.endswith("use --to merged")


def test_a_number_format_of_another_version_is_refused(make, tmp_path):
    made = make()
    edit_json(made.folder / "jaxpeft.json", lambda extra: extra.update(quant={"form": "nf3"}))
    text = made.refused(tmp_path / "merged", to="merged_quantized_reference")
    assert (
        "jaxpeft.json: quant: 'nf3' is not a number format (known: nf4, int4, int8, fp8, mxfp4)"
        in text
    )
    edit_json(made.folder / "jaxpeft.json", lambda extra: extra.update(quant="nf4"))
    assert "jaxpeft.json: quant: 'nf4' is not supported by this version of jaxpeft" in made.refused(
        tmp_path / "merged"
    )


# ----------------------------------------------------------------------------------------- refusals


def test_a_folder_that_holds_something_is_refused(make, tmp_path):
    made = make()
    assert made.refused(made.base).endswith("is not empty; choose a new folder")
    (tmp_path / "file").write_text("")
    assert made.refused(tmp_path / "file").endswith("is a file; choose a new folder")
    with pytest.raises(ConfigError, match="--output /proc/nowhere: cannot be written"):
        made.export(Path("/proc/nowhere"))
    (tmp_path / "empty").mkdir()
    made.export(tmp_path / "empty" / "below" / "it", "peft")
    (tmp_path / "new").mkdir()
    made.export(tmp_path / "new", "peft")


def test_an_adapter_is_not_merged_twice(make, tmp_path):
    made = make()
    made.export(tmp_path / "merged")
    out, merged = tmp_path / "again", tmp_path / "merged"
    text = made.refused(out, AdapterError, base=str(merged))
    assert (
        text
        == f"{merged}: according to jaxpeft_merge.json, this adapter is already merged into it;"
        " use the base that it was trained on"
    )
    # without a fingerprint of the base, and with another adapter merged on top
    shutil.copytree(made.folder, tmp_path / "plain")
    (tmp_path / "plain" / "jaxpeft.json").unlink()
    edit_json(
        tmp_path / "plain" / "adapter_config.json",
        lambda config: config.update(base_model_name_or_path="x"),
    )
    plain = dataclasses.replace(made, folder=tmp_path / "plain")
    assert "already merged into it" in plain.refused(out, AdapterError, base=str(merged))
    other = make(jaxpeft.LoRA(rank=2, targets=("query",)), base=merged)
    other.export(tmp_path / "both")
    assert "already merged into it" in plain.refused(out, AdapterError, base=str(tmp_path / "both"))


def test_an_adapter_is_not_merged_into_another_base(make, tmp_path):
    def nudge(tensors):
        tensors["bert.embeddings.word_embeddings.weight"][0, 0] += 1

    made = make()
    other = edited(made.base, tmp_path / "other", nudge)
    text = made.refused(tmp_path / "out", AdapterError, base=str(other))
    assert (
        f"the adapter was trained on another base ('{made.base}'), not {other}: the weights differ"
        in text
    )
    made.export(tmp_path / "out", base=str(other), allow_base=True)


def test_a_base_that_the_adapter_does_not_know_is_not_checked_which_is_said(make, tmp_path, caplog):
    made = make()
    (made.folder / "jaxpeft.json").unlink()
    made.export(tmp_path / "out")
    assert (
        f"{made.folder}: has no base_sha256, so whether {made.base} is its base is not checked"
        in caplog.text
    )


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (
            jaxpeft.PrefixTuning(num_virtual_tokens=3),
            "prefix cannot be merged: its computation cannot be expressed by plain weights; keep",
        ),
        (
            jaxpeft.Adapter(reduction_factor=4),
            "adapter cannot be merged: its computation cannot be expressed by plain weights; keep",
        ),
        (
            jaxpeft.Mixed(methods=(LORA, jaxpeft.PromptTuning(num_virtual_tokens=3))),
            "prompt cannot be merged",
        ),
    ],
)
def test_what_no_plain_weights_compute_is_not_merged(make, tmp_path, method, text):
    assert text in make(method).refused(tmp_path / "out")


def test_a_bias_that_the_base_has_no_place_for_is_not_merged(make, tmp_path):
    made = make(jaxpeft.LoRA(targets=("q_proj",), lora_bias=True), "llama", CAUSAL)
    text = made.refused(tmp_path / "out")
    assert "q_proj: merging lora needs a bias, but the module has none; keep the adapter" in text


def test_an_adapter_that_says_no_task_or_base_needs_them(make, tmp_path):
    made = make()
    (made.folder / "jaxpeft.json").unlink()
    config = made.folder / "adapter_config.json"
    edit_json(config, lambda values: values.update(task_type=None, base_model_name_or_path=None))
    assert (
        made.refused(tmp_path / "out")
        == f"--base: is required, since {config} names no base model; set its folder or hub id"
    )
    text = made.refused(tmp_path / "out", base=str(made.base))
    assert text.startswith(
        f"--task: is required, since {config} has no task_type; use one of causal_lm, "
    )
    made.export(tmp_path / "out", base=str(made.base), task=SEQUENCE)
    edit_json(config, lambda values: values.update(task_type="QUESTION_ANS"))
    assert "task_type 'QUESTION_ANS' is not supported" in made.refused(
        tmp_path / "x", base=str(made.base)
    )


def test_a_task_that_the_adapter_was_not_trained_for_is_refused(make, tmp_path):
    text = make().refused(tmp_path / "out", task=TOKENS)
    assert text == f"--task: is {TOKENS}, but the adapter was trained for {SEQUENCE}; omit it"


def test_a_base_that_is_gone_is_asked_for(make, tmp_path):
    made = make()
    edit_json(
        made.folder / "adapter_config.json",
        lambda config: config.update(base_model_name_or_path="./gone"),
    )
    text = made.refused(tmp_path / "out", WeightsError)
    assert "model path './gone': no such folder" in text
    assert text.endswith("adapter_config.json; set its path with --base")
    made.export(tmp_path / "out", base=str(made.base))


@pytest.mark.parametrize("name", ["nothing", "empty"])
def test_a_folder_without_an_adapter_is_refused(make, tmp_path, name):
    made = make()
    (tmp_path / "empty").mkdir()
    text = dataclasses.replace(made, folder=tmp_path / name).refused(tmp_path / "out", AdapterError)
    assert text.startswith(f"{tmp_path / name}: no ")


def test_a_disk_without_room_is_refused_before_a_byte_is_written(make, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    assert "GB are free" in make().refused(tmp_path / "out")


# ------------------------------------------------------------------------------ whole or not at all


@pytest.mark.parametrize("to", ["merged", "peft"])
def test_what_does_not_compute_the_same_is_an_error_and_is_not_kept(
    make, tmp_path, monkeypatch, to
):
    def spoil(file, change):
        def spoiled(*args: Any, **kw: Any) -> Any:
            out = real_write(*args, **kw)
            tensors = load_file(args[0] / file)
            name = next(name for name in tensors if change in name)
            content = bytearray((args[0] / file).read_bytes())
            at = content.find(tensors[name].tobytes())
            content[at : at + tensors[name].nbytes] = (tensors[name] * 2).tobytes()
            (args[0] / file).write_bytes(content)
            if to == "peft":  # whose SHA-256 would tell it before
                edit_json(args[0] / "jaxpeft.json", lambda extra: extra.pop("sha256"))
            return out

        return spoiled

    made = make()
    if to == "merged":
        real_write = merged_model.write
        monkeypatch.setattr(merged_model, "write", spoil("model.safetensors", "query.weight"))
        # which would tell it before
        monkeypatch.setattr(merge_record, "require_undamaged", lambda folder: None)
    else:
        real_write = jaxpeft.save_adapter
        monkeypatch.setattr(
            "jaxpeft.export.to_peft.save_adapter", spoil("adapter_model.safetensors", "lora_A")
        )
    text = made.refused(tmp_path / "out", ExportError, to)
    assert "loaded again: logits differ by " in text
    assert "on the probe batch, at most" in text


def test_a_fold_that_is_wrong_is_an_error(make, tmp_path, monkeypatch):
    right = jaxpeft.LoRA.fold
    monkeypatch.setattr(
        jaxpeft.LoRA,
        "fold",
        staticmethod(lambda leaves, base: {"kernel": 1.01 * right(leaves, base)["kernel"]}),
    )
    text = make().refused(tmp_path / "out", ExportError)
    assert text.startswith("the merged weights, compared with the adapter: logits differ by ")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(make, tmp_path, monkeypatch, error):
    def interrupted(*args: Any) -> None:
        raise error

    made = make()
    monkeypatch.setattr(merged_model, "config_of", interrupted)
    made.refused(tmp_path / "out", type(error))
    monkeypatch.undo()
    made.export(tmp_path / "out")


# --------------------------------------------------------------------------------------------- peft


def test_a_start_in_the_base_becomes_a_plain_lora_of_twice_the_rank(make, tmp_path):
    method = jaxpeft.LoRA(rank=4, alpha=6.0, targets=("query",), init_weights="pissa")
    made = make(method)
    made.export(tmp_path / "peft", "peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["init_lora_weights"]) == (8, 12.0, True)
    assert_close(theirs(SEQUENCE, peft_load(made.base, SEQUENCE, tmp_path / "peft")), made.logits())


@pytest.mark.slow
def test_a_network_that_makes_a_prefix_is_left_out(make, tmp_path):
    method = jaxpeft.PrefixTuning(num_virtual_tokens=3, projection=True, encoder_hidden_size=12)
    made = make(method, "llama", CAUSAL)
    report = made.export(tmp_path / "peft", "peft")
    assert set(load_file(tmp_path / "peft" / "adapter_model.safetensors")) == {"prompt_embeddings"}
    assert "peft.PeftModel.from_pretrained(" in report.lines[-1]
    loaded = theirs(CAUSAL, peft_load(made.base, CAUSAL, tmp_path / "peft"))
    assert_close(loaded, made.logits())


def test_methods_together_are_one_folder_each(make, tmp_path):
    made = make(
        jaxpeft.Mixed(methods=(jaxpeft.LoRA(targets=("q_proj",)), jaxpeft.LNTuning())),
        "llama",
        CAUSAL,
    )
    report = made.export(tmp_path / "peft", "peft")
    assert names(tmp_path / "peft") == {"lora", "ln_tuning", "jaxpeft_parts.json"}
    assert report.lines[-1].endswith("other libraries load its folders one by one")
    model, base = jaxpeft.load(made.base, task=CAUSAL)
    _, params = jaxpeft.load_adapter(tmp_path / "peft", model, base)
    assert_close(ours(model, params), made.logits())


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (jaxpeft.BitFit(), "other libraries do not support bitfit"),
        (
            jaxpeft.Adapter(reduction_factor=4),
            "load it: the adapters library (AdapterHub) or jaxpeft.load_adapter(",
        ),
    ],
)
def test_who_can_load_it_is_said(make, tmp_path, method, text):
    assert text in make(method).export(tmp_path / "out", "peft").lines[-1]


def test_the_name_of_the_base_stays_wherever_it_lies_here(make, tmp_path):
    made = make(labels=LABELS)
    edit_json(
        made.folder / "adapter_config.json",
        lambda config: config.update(base_model_name_or_path="org/name", revision="abc"),
    )
    made.export(tmp_path / "out", "peft", base=str(made.base))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "abc")
    assert jaxpeft.read_settings(made.folder) == jaxpeft.read_settings(tmp_path / "out")


@pytest.mark.parametrize("kind", ["bert", "roberta", "llama"])
@pytest.mark.representatives("bert")
def test_an_adapter_of_the_real_peft_is_merged_with_its_head(reference, tmp_path, kind):
    """Its base has no head, and nothing but the adapter's own head tells the number of labels."""
    base, task = reference(kind, ENCODER).folder, SEQUENCE
    import transformers

    torch_model = transformers.AutoModelForSequenceClassification.from_pretrained(
        base, num_labels=5
    ).eval()
    torch_model.save_pretrained(tmp_path / "with head")
    adapted = peft_save(
        tmp_path / "with head",
        task,
        tmp_path / "adapter",
        target_modules=["q_proj" if kind == "llama" else "query"],
    )
    export(ExportRequest(tmp_path / "adapter", "merged", tmp_path / "out", base=str(base)))
    loaded = torch_base(tmp_path / "out", task)
    assert loaded.config.num_labels == 5
    assert_close(theirs(task, loaded), theirs(task, adapted))
