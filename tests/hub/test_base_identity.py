from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.errors import AdapterError
from jaxpeft.hub.base_identity import earlier_fingerprint, fingerprint
from jaxpeft.hub.sources import Source
from jaxpeft.hub.weights import digests
from tests.hub.helpers import assert_bit_equal, edit_json, edited, shard, write_raw
from tests.models.conftest import Reference

SEQUENCE = "sequence_classification"


def _rope_as_before(config):
    rope = config.pop("rope_parameters")
    config |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None}


CONFIGS = {
    "use_cache": (
        "llama",
        lambda c: c.update(use_cache=False, transformers_version="4.30.0", architectures=["Other"]),
    ),
    "torch_dtype": ("llama", lambda c: c.update(torch_dtype=c.pop("dtype"))),
    "rope of transformers 4": ("llama", _rope_as_before),
    "defaults left out": (
        "llama",
        lambda c: [c.pop(key, None) for key in ("attention_dropout", "mlp_bias", "head_dim")],
    ),
    "order of keys": ("qwen3", lambda c: [c.update({key: c.pop(key)}) for key in sorted(c)]),
    "a padding token": ("llama", lambda c: c.update(pad_token_id=0)),
    "more positions": ("mistral", lambda c: c.update(max_position_embeddings=4096)),
    "dropout": (
        "bert",
        lambda c: c.update(classifier_dropout=0.3, attention_probs_dropout_prob=0.0),
    ),
    "names of labels": (
        "bert",
        lambda c: c.update(id2label={"0": "a", "1": "b", "2": "c"}, problem_type=None),
    ),
}


def _shards(folder, tensors):
    names = sorted(tensors)
    shard(
        folder,
        {f"model-{i}.safetensors": {name: tensors[name] for name in names[i::3]} for i in range(3)},
    )
    (folder / "model.safetensors").unlink()


def _other_order(folder, tensors):
    header, data = {"__metadata__": {"format": "pt", "by": "somebody"}}, b""
    for name in sorted(tensors, reverse=True):
        raw = tensors[name].tobytes()
        header[name] = {
            "dtype": "F32",
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    write_raw(folder / "model.safetensors", header, data)


def _without_prefix(folder, tensors):
    save_file(
        {name.removeprefix("model."): tensor for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )


def _half_without_prefix(folder, tensors):
    turned = {
        name.removeprefix("model.") if ".1." in name else name: tensor
        for name, tensor in tensors.items()
    }
    save_file(turned, folder / "model.safetensors")


def _old_buffers(folder, tensors):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    save_file(tensors | extra, folder / "model.safetensors")


FILES = {
    "three files": _shards,
    "order and metadata": _other_order,
    "no prefix": _without_prefix,
    "some without": _half_without_prefix,
    "buffers": _old_buffers,
}


def saved_on(save, kind, config=None, files=None, task=None, target=None):
    task = task or (SEQUENCE if kind == "bert" else "causal_lm")
    saved = save(
        jaxpeft.LoRA(rank=2, targets=("query",) if kind == "bert" else ("q_proj",)), kind, task
    )
    other = edited(saved.model.source.folder, target, config=config)
    if files is not None:
        files(other, load_file(other / "model.safetensors"))
    return saved, other, task


@pytest.mark.parametrize(("kind", "change"), CONFIGS.values(), ids=CONFIGS)
@pytest.mark.representatives(
    "defaults left out", "names of labels", "use_cache", "torch_dtype", "rope of transformers 4"
)
def test_a_config_that_was_saved_again_is_of_the_same_base(save, tmp_path, kind, change):
    saved, other, task = saved_on(save, kind, change, target=tmp_path / "other")
    assert_bit_equal(saved.load(base=other, task=task)[1], saved.params)


@pytest.mark.parametrize("change", FILES.values(), ids=FILES)
def test_the_same_tensors_in_other_files_are_the_same_base(save, tmp_path, change):
    saved, other, task = saved_on(save, "llama", files=change, target=tmp_path / "other")
    assert_bit_equal(saved.load(base=other, task=task)[1], saved.params)


def test_the_copy_that_a_tied_head_is_makes_no_other_base(reference, tmp_path):
    tied = reference("llama", "causal_lm", tie_word_embeddings=True).folder

    def copied(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    def head_alone(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    found = {
        fingerprint(Source("m", folder))
        for folder in (
            tied,
            edited(tied, tmp_path / "a", copied),
            edited(tied, tmp_path / "b", head_alone),
        )
    }
    assert len(found) == 1


OTHER = {
    "theta": (
        "llama",
        lambda c: c["rope_parameters"].update(rope_theta=500.0),
        r"rope\.theta was 10000\.0, config\.json has 500\.0",
    ),
    "norm": (
        "llama",
        lambda c: c.update(rms_norm_eps=0.25),
        r"rms_norm_eps was \S+, config\.json has 0\.25; load the base",
    ),
    "activation": (
        "bert",
        lambda c: c.update(hidden_act="relu"),
        r"hidden_act was 'gelu', config\.json has 'relu'",
    ),
    "window": (
        "mistral",
        lambda c: c.update(sliding_window=2),
        r"windows was \[4096, 4096\], config\.json has \[2, 2\]",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), OTHER.values(), ids=OTHER)
def test_another_architecture_is_refused_by_what_differs_unless_it_is_allowed(
    save, tmp_path, caplog, kind, change, message
):
    saved, other, task = saved_on(save, kind, change, target=tmp_path / "other")
    model, base = jaxpeft.load(other, task=task)
    with pytest.raises(AdapterError, match=message) as caught:
        jaxpeft.load_adapter(saved.folder, model, base)
    assert "the weights differ" not in str(caught.value)
    _, params = jaxpeft.load_adapter(saved.folder, model, base, allow_base=True)
    assert_bit_equal(params, saved.params)
    assert "the adapter was trained on another base" in caplog.text


def test_an_adapter_of_an_earlier_version_is_held_to_what_that_version_wrote(save, tmp_path):
    saved, other, task = saved_on(
        save, "llama", lambda c: c.update(use_cache=False), target=tmp_path / "other"
    )
    source = saved.model.source

    def as_before(extra):
        extra.pop("base_config"), extra.pop("sha256")
        extra["base_sha256"] = earlier_fingerprint(source)

    edit_json(saved.folder / "jaxpeft.json", as_before)
    assert_bit_equal(saved.load(base=source.folder, task=task)[1], saved.params)
    (problem,) = saved.problems(base=other, task=task)
    assert (
        "an earlier version of jaxpeft saved the adapter" in problem and "--allow-base" in problem
    )


def test_fields_of_experts_that_an_earlier_version_did_not_write_have_their_defaults(
    reference, tmp_path
):
    model, base = jaxpeft.load(reference("mixtral", "causal_lm").folder, task="causal_lm")
    method = jaxpeft.LoRA(rank=2, targets=("q_proj",))
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    jaxpeft.save_adapter(tmp_path / "a", method, params, model)

    def earlier(content):
        mixture = content["base_config"]["mixture"]
        for name in ("shared", "bias", "stacked", "clamp"):
            del mixture[name]
        for name in ("name", "bias"):
            del mixture["routing"][name]

    edit_json(tmp_path / "a" / "jaxpeft.json", earlier)
    jaxpeft.load_adapter(tmp_path / "a", model, base)


def test_the_fingerprint_is_the_same_where_files_are_hashed_in_turns(
    reference: Reference, tmp_path, monkeypatch
):
    folder = shutil.copytree(reference("llama", "causal_lm").folder, tmp_path / "m")
    _shards(folder, load_file(folder / "model.safetensors"))
    source, read, whole = Source("m", folder), [], digests.file_tensors_sha256
    monkeypatch.setattr(
        digests, "file_tensors_sha256", lambda path: read.append(path.name) or whole(path)
    )
    alone = fingerprint(source)
    assert len(read) == 3
    lines: list[str] = []
    fingerprint(source, lambda own: lines.extend(own) or own, slice(1, None, 2))
    assert read[3:] == ["model-1.safetensors"]
    assert fingerprint(source, lambda own: [*own, *lines], slice(0, None, 2)) == alone
    assert fingerprint(Source("m", folder, sha256="known")) == "known"


def test_the_fingerprint_sees_a_number_that_changes_in_place(reference, tmp_path):
    folder = shutil.copytree(reference("bert", SEQUENCE).folder, tmp_path / "m")
    before = fingerprint(Source("m", folder))
    tensors = load_file(folder / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.bias"][3] += 1
    save_file(tensors, folder / "model.safetensors")
    assert fingerprint(Source("m", folder)) != before
    assert json.loads((folder / "config.json").read_text())["model_type"] == "bert"
