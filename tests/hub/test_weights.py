from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import load_file

import jaxpeft
from jaxpeft import models
from jaxpeft.core import paths
from jaxpeft.errors import WeightsError
from jaxpeft.hub import weights
from jaxpeft.hub.loading import abstract_params
from jaxpeft.hub.safetensors_files import open_folder
from jaxpeft.models.base import Options
from tests.hub.helpers import assert_bit_equal, edited, shard
from tests.models.conftest import LABELS, make_batch, tiny_config

SEQUENCE = "sequence_classification"


def load(folder, task=SEQUENCE, **options):
    labels = LABELS if "classification" in task else None
    return jaxpeft.load(folder, **({"task": task, "num_labels": labels, "dtype": jnp.float32} | options))


def problems(folder, task=SEQUENCE, **options):
    with pytest.raises(WeightsError) as caught:
        load(folder, task, **options)
    head, *rest = caught.value.problems
    assert head == f"{folder}: the weights do not fit the model in config.json ({len(rest)} problems):"
    return rest


def test_every_misfit_is_listed_at_once_with_the_nearest_names(reference, tmp_path):
    def spoil(tensors):
        query = "bert.encoder.layer.0.attention.self.query"
        tensors[f"{query}s.weight"] = tensors.pop(f"{query}.weight")
        tensors["bert.encoder.layer.1.output.dense.weight"] = np.zeros((48, 32), np.float32)
        tensors["bert.embeddings.LayerNorm.bias"] = np.zeros(32, np.int32)
        del tensors["bert.encoder.layer.1.intermediate.dense.bias"]
        tensors["adapter.down"] = np.zeros(3, np.float32)

    folder = edited(reference("bert", SEQUENCE).folder, tmp_path / "m", spoil)
    found = problems(folder)
    assert len(found) == 6
    query = "bert.encoder.layer.0.attention.self.query"
    assert (
        "not floating: bert.embeddings.LayerNorm.bias is int32 (a quantized checkpoint?); use the unquantized model"
        in found
    )
    assert "misshaped: bert.encoder.layer.1.output.dense.weight is [48, 32], must be [32, 48]" in found
    assert any(p.startswith(f"missing: {query}.weight; did you mean '{query}s.weight'") for p in found)
    assert any(p.startswith(f"extra: {query}s.weight belongs to no part of this model; did you mean") for p in found)
    assert any(p.startswith("missing: bert.encoder.layer.1.intermediate.dense.bias; did you mean") for p in found)
    assert "extra: adapter.down belongs to no part of this model" in found
    assert sorted(problems(folder, scan_layers=True)) == sorted(found)


def test_60_problems_are_listed_and_the_rest_counted(reference, tmp_path):
    deeper = edited(reference("bert", SEQUENCE).folder, tmp_path / "m", config=lambda c: c.update(num_hidden_layers=8))
    with pytest.raises(WeightsError, match=r"do not fit the model in config\.json \(96 problems\):") as caught:
        load(deeper)
    assert len(caught.value.problems) == 62
    assert caught.value.problems[-1] == "... and 36 more"


# ---------------------------------------------------------------------------------------------------------------- head


def test_a_head_for_other_labels_is_made_newly_with_a_warning(reference, caplog):
    source = reference("roberta", SEQUENCE).folder
    with caplog.at_level("INFO", logger="jaxpeft"):
        _, params = load(source, num_labels=7)
    warning = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    message, names = warning[0].rsplit(": ", 1)
    assert message == "the checkpoint's head is for another number of labels and was made newly"
    assert sorted(names.split(", ")) == ["classifier.out_proj.bias", "classifier.out_proj.weight"]
    assert "newly made head: classifier/out_proj" in [r.getMessage() for r in caplog.records]
    tensors = load_file(source / "model.safetensors")
    head = params["classifier"]
    np.testing.assert_array_equal(head["dense"]["kernel"], tensors["classifier.dense.weight"].T)
    assert head["out_proj"]["kernel"].shape == (32, 7)
    assert 0 < float(jnp.std(head["out_proj"]["kernel"])) < 1
    np.testing.assert_array_equal(head["out_proj"]["bias"], np.zeros(7))


def test_a_head_of_the_right_size_is_kept_without_a_warning(reference, caplog):
    torch_model = reference("bert", SEQUENCE)
    _, params = load(torch_model.folder)
    tensors = load_file(torch_model.folder / "model.safetensors")
    np.testing.assert_array_equal(params["classifier"]["kernel"], tensors["classifier.weight"].T)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_the_new_head_is_float32_and_follows_the_seed(reference):
    folder = reference("bert", "encoder").folder
    made = [load(folder, dtype=jnp.bfloat16, seed=seed, scan_layers=scan)[1] for seed, scan in [(0, 0), (0, 1), (1, 0)]]
    heads = [np.asarray(tree["classifier"]["kernel"]) for tree in made]
    assert heads[0].dtype == np.float32
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 1e-3


# --------------------------------------------------------------------------------------------------- prefixes and names


def backbone_equals(params, tensors, prefix, path=()):
    """Every leaf but those of the head equals the tensor of its name, `prefix` put before or taken from it."""
    seen = 0
    for leaf_path, leaf in paths.walk(params):
        if paths.is_head(leaf_path):
            continue
        (name,) = paths.hf_names(leaf_path, None)
        name = name.removeprefix(prefix[1:]) if prefix.startswith("-") else prefix + name
        wanted = tensors[name].T if leaf_path[-1] == "kernel" else tensors[name]
        np.testing.assert_array_equal(np.asarray(leaf), wanted, err_msg=name)
        seen += 1
    assert seen > 10


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_a_backbone_without_prefix_goes_under_a_head_and_back(reference, kind):
    bare = reference(kind, "encoder").folder
    tensors = load_file(bare / "model.safetensors")
    assert not any(name.startswith(f"{kind}.") for name in tensors)
    backbone_equals(load(bare)[1], tensors, f"-{kind}.")
    with_head = reference(kind, SEQUENCE).folder
    backbone_equals(load(with_head, "encoder")[1], load_file(with_head / "model.safetensors"), f"{kind}.")


@pytest.mark.parametrize("task", [SEQUENCE, "token_classification", "encoder"])
def test_a_masked_language_model_gives_its_backbone(tmp_path, caplog, task):
    from transformers import BertConfig, BertForMaskedLM

    config = {key: value for key, value in tiny_config("bert").items() if key != "model_type"}
    BertForMaskedLM(BertConfig(**config)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors) and not any("pooler" in name for name in tensors)
    model, params = load(tmp_path, task)
    backbone_equals(params, tensors, "bert." if task == "encoder" else "")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if task == SEQUENCE:
        assert model.options.pooling == "mean"
        assert warnings == [
            "the checkpoint has no pooler (pooler.dense.weight); the classifier reads the mean over tokens"
        ]
    else:
        assert not warnings


@pytest.mark.parametrize("scan", [False, True])
def test_a_tied_decoder_backbone_without_prefix_gives_the_logits_of_torch(reference, scan):
    import torch
    from transformers import AutoModelForCausalLM

    folder = reference("llama", "encoder", tie_word_embeddings=True).folder
    assert "embed_tokens.weight" in load_file(folder / "model.safetensors")
    batch = make_batch("right")
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(folder).eval()(torch.tensor(batch.ids).long()).logits.numpy()
    model, params = load(folder, "causal_lm", scan_layers=scan)
    ours = jax.jit(lambda ids: jaxpeft.apply(model, params, ids))(batch.ids)
    assert params.keys() == {"model"}
    assert np.abs(np.asarray(ours) - wanted).max() <= 1e-4 < np.abs(wanted).max()


def test_an_untied_decoder_backbone_has_no_language_model_head(reference):
    found = problems(reference("llama", "encoder", tie_word_embeddings=False).folder, "causal_lm")
    assert len(found) == 1 and found[0].startswith("missing: lm_head.weight")


@pytest.mark.parametrize("task", [SEQUENCE, "token_classification", "encoder"])
def test_a_language_model_gives_its_backbone(reference, task):
    folder = reference("llama", "causal_lm").folder
    _, params = load(folder, task)
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" in tensors
    backbone_equals(params, tensors, "model." if task == "encoder" else "")
    assert ("score" in params) == (task != "encoder")


@pytest.mark.parametrize("task", ["encoder", SEQUENCE])
def test_old_names_of_layer_norms_are_read(reference, tmp_path, task):
    def age(tensors):
        for name in [name for name in tensors if "LayerNorm" in name]:
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[old] = tensors.pop(name)

    source = reference("bert", task).folder
    old = edited(source, tmp_path / "old", age)
    assert not any("LayerNorm.weight" in name for name in load_file(old / "model.safetensors"))
    assert_bit_equal(load(old, task)[1], load(source, task)[1])


# ------------------------------------------------------------------------------------------------------ layers and dtypes


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", SEQUENCE), ("distilbert", "encoder")])
def test_scanned_layers_are_the_unrolled_ones_stacked(reference, kind, task):
    folder = reference(kind, task).folder
    stacked, unrolled = load(folder, task, scan_layers=True)[1], load(folder, task)[1]
    assert_bit_equal(stacked, jaxpeft.stack_layers(unrolled))
    assert_bit_equal(jaxpeft.unstack_layers(stacked), unrolled)


@pytest.mark.parametrize("scan", [False, True])
def test_bfloat16_is_the_rounded_float32(reference, scan):
    folder = reference("llama", SEQUENCE).folder
    wide = load(folder, scan_layers=scan)[1]
    rounded = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), wide)
    assert_bit_equal(load(folder, dtype=jnp.bfloat16, scan_layers=scan)[1], rounded)


def test_the_dtype_of_the_file_is_kept(reference, tmp_path):
    import ml_dtypes

    def halve(tensors):
        tensors.update({name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in tensors.items()})

    source = reference("llama", "causal_lm").folder
    folder = edited(source, tmp_path / "m", halve)
    model, params = load(folder, "causal_lm", dtype=None)
    assert model.options.dtype == jnp.bfloat16
    assert_bit_equal(params, load(source, "causal_lm", dtype=jnp.bfloat16)[1])


@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_put_together_are_the_tensor(tmp_path, monkeypatch, transposed):
    monkeypatch.setattr(weights, "_BLOCK_BYTES", 64)
    wanted = np.random.default_rng(0).standard_normal((3, 37, 11)).astype(np.float32)
    shard(tmp_path, {"m.safetensors": {str(i): wanted[i] for i in range(3)}})
    tensors = open_folder(tmp_path)
    leaf = wanted.swapaxes(1, 2) if transposed else wanted
    source = weights.LeafSource(
        tuple(tensors[str(i)] for i in range(3)), leaf.shape, np.dtype(np.float32), stacked=True, transposed=transposed
    )
    np.testing.assert_array_equal(source.read(None), leaf)
    index = (slice(1, 3), slice(3, 9), slice(2, 7))
    np.testing.assert_array_equal(source.read(index), leaf[index])


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_sharded_read_over_8_devices_equals_the_plain_one(reference, tmp_path, scan, axis):
    sizes = {"vocab_size": 96, "num_hidden_layers": 8, "type_vocab_size": 8}
    folder = reference("bert", "encoder", **sizes).folder
    split = load_file(folder / "model.safetensors")
    names = sorted(split)
    halves = {f"m-{i}.safetensors": {name: split[name] for name in names[i::2]} for i in range(2)}
    shard(tmp_path, halves)
    config = tiny_config("bert", **sizes)
    model = models.build(config, Options("encoder", None, jnp.dtype(jnp.float32), scan_layers=scan))
    abstract = abstract_params(model)
    plan = weights.plan(abstract, open_folder(tmp_path), models.FAMILIES["bert"], None)
    assert plan.new == plan.replaced == ()
    mesh = Mesh(np.asarray(jax.devices()), "x")
    assert mesh.size == 8
    plain = load(folder, "encoder", scan_layers=scan)[1]
    if axis == 0:
        sharded = weights.read(abstract, plan, {}, NamedSharding(mesh, PartitionSpec("x")))
    else:
        spec = {n: NamedSharding(mesh, PartitionSpec(*[None] * (n - 1), "x")) for n in (1, 2, 3)}
        sharded = paths.build(
            [
                (path, jax.make_array_from_callback(leaf.shape, spec[leaf.ndim], plan.sources[path].read))
                for path, leaf in paths.walk(abstract)
            ]
        )
    for _, leaf in paths.walk(sharded):
        assert len({s.device for s in leaf.addressable_shards}) == 8
        assert all(s.data.size * 8 == leaf.size for s in leaf.addressable_shards)
    assert_bit_equal(sharded, plain)
