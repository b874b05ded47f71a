from __future__ import annotations

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxpeft
from jaxpeft.core import paths
from jaxpeft.core.tree import unstack_layers
from jaxpeft.errors import WeightsError
from tests.hub.helpers import assert_bit_equal, edited
from tests.models.conftest import LABELS, make_batch, tiny_config

SEQUENCE = "sequence_classification"


def load(folder, task=SEQUENCE, **options):
    labels = LABELS if "classification" in task else None
    return jaxpeft.load(
        folder, **({"task": task, "num_labels": labels, "dtype": jnp.float32} | options)
    )


def problems(folder, task=SEQUENCE, **options):
    with pytest.raises(WeightsError) as caught:
        load(folder, task, **options)
    head, *rest = caught.value.problems
    assert (
        head == f"{folder}: the weights do not fit the model in config.json ({len(rest)} problems):"
    )
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
        "not floating: bert.embeddings.LayerNorm.bias is int32 (a quantized checkpoint?); use the"
        " unquantized model" in found
    )
    assert (
        "misshaped: bert.encoder.layer.1.output.dense.weight is [48, 32], must be [32, 48]" in found
    )
    assert any(
        p.startswith(f"missing: {query}.weight; did you mean '{query}s.weight'") for p in found
    )
    assert any(
        p.startswith(f"extra: {query}s.weight is not part of this model; did you mean")
        for p in found
    )
    assert any(
        p.startswith("missing: bert.encoder.layer.1.intermediate.dense.bias; did you mean")
        for p in found
    )
    assert "extra: adapter.down is not part of this model" in found
    assert sorted(problems(folder, scan_layers=True)) == sorted(found)


def test_60_problems_are_listed_and_the_rest_counted(reference, tmp_path):
    def last(tensors):
        for name in [name for name in tensors if ".layer.1." in name]:
            tensors[name.replace(".layer.1.", ".layer.7.")] = tensors.pop(name)

    folder = reference("bert", SEQUENCE).folder
    deeper = edited(folder, tmp_path / "m", last, lambda c: c.update(num_hidden_layers=8))
    with pytest.raises(
        WeightsError, match=r"do not fit the model in config\.json \(96 problems\):"
    ) as caught:
        load(deeper)
    assert len(caught.value.problems) == 62
    assert caught.value.problems[-1] == "... and 36 more"


# --------------------------------------------------------------------------------------------- head


def test_a_head_for_other_labels_is_made_newly_with_a_warning(reference, caplog):
    source = reference("roberta", SEQUENCE).folder
    with caplog.at_level("INFO", logger="jaxpeft"):
        _, params = load(source, num_labels=7)
    warning = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    message, names = warning[0].rsplit(": ", 1)
    assert message == (
        "the checkpoint's head has a different number of labels and was newly initialized"
    )
    assert sorted(names.split(", ")) == ["classifier.out_proj.bias", "classifier.out_proj.weight"]
    assert "newly initialized head: classifier/out_proj" in [r.getMessage() for r in caplog.records]
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
    made = [
        load(folder, dtype=jnp.bfloat16, seed=seed, scan_layers=scan)[1]
        for seed, scan in [(0, 0), (0, 1), (1, 0)]
    ]
    heads = [np.asarray(tree["classifier"]["kernel"]) for tree in made]
    assert heads[0].dtype == np.float32
    np.testing.assert_array_equal(heads[0], heads[1])
    assert np.abs(heads[0] - heads[2]).max() > 1e-3


# ------------------------------------------------------------------------------- prefixes and names


def backbone_equals(params, tensors, prefix, path=()):
    """Every leaf but those of the head equals the tensor of its name, `prefix` put before or taken
    from it.
    """
    seen = 0
    for leaf_path, leaf in paths.walk(params):
        if paths.is_head(leaf_path):
            continue
        (name,) = paths.hf_names(leaf_path)
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
    backbone_equals(
        load(with_head, "encoder")[1], load_file(with_head / "model.safetensors"), f"{kind}."
    )


@pytest.mark.parametrize("task", [SEQUENCE, "token_classification", "encoder"])
def test_a_masked_language_model_gives_its_backbone(tmp_path, caplog, task):
    from transformers import BertConfig, BertForMaskedLM

    config = {key: value for key, value in tiny_config("bert").items() if key != "model_type"}
    BertForMaskedLM(BertConfig(**config)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(name.startswith("cls.") for name in tensors) and not any(
        "pooler" in name for name in tensors
    )
    model, params = load(tmp_path, task)
    backbone_equals(params, tensors, "bert." if task == "encoder" else "")
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if task == SEQUENCE:
        assert model.options.pooling == "mean"
        assert warnings == [
            ("the checkpoint has no pooler (pooler.dense.weight); the classifier uses mean pooling")
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
        wanted = (
            AutoModelForCausalLM.from_pretrained(folder)
            .eval()(torch.tensor(batch.ids).long())
            .logits.numpy()
        )
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
            old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            )
            tensors[old] = tensors.pop(name)

    source = reference("bert", task).folder
    old = edited(source, tmp_path / "old", age)
    assert not any("LayerNorm.weight" in name for name in load_file(old / "model.safetensors"))
    assert_bit_equal(load(old, task)[1], load(source, task)[1])


SEQUENCE = "sequence_classification"


@pytest.mark.parametrize(
    ("kind", "change", "text"),
    [
        ("bert", lambda t: t.pop("classifier.weight"), "missing: classifier.weight"),
        ("bert", lambda t: t.pop("classifier.bias"), "missing: classifier.bias"),
        ("roberta", lambda t: t.pop("classifier.dense.weight"), "missing: classifier.dense.weight"),
        (
            "bert",
            lambda t: t.update({"classifier.weight": t["classifier.weight"][:, :5]}),
            "misshaped: classifier.weight",
        ),
        (
            "bert",
            lambda t: t.update({"classifer.weight": t.pop("classifier.weight")}),
            "extra: classifer.weight",
        ),
        (
            "roberta",
            lambda t: t.update({"classifier.dense.weight": t["classifier.dense.weight"][:5, :7]}),
            "misshaped: classifier.dense.weight",
        ),
    ],
)
def test_a_head_that_is_there_in_part_is_refused(reference, tmp_path, kind, change, text):
    folder = edited(reference(kind, SEQUENCE).folder, tmp_path / "m", weights=change)
    with pytest.raises(WeightsError) as caught:
        jaxpeft.load(folder, task=SEQUENCE)
    assert text in str(caught.value)


def test_a_trained_head_is_not_thrown_away_for_a_config_of_other_labels(reference, tmp_path):
    def labels(config):
        config["id2label"] = {str(i): str(i) for i in range(5)}

    folder = edited(reference("bert", SEQUENCE).folder, tmp_path / "m", config=labels)
    with pytest.raises(
        WeightsError,
        match=r"has 3 labels, but config\.json has 5; set num_labels=3 to keep the head",
    ):
        jaxpeft.load(folder, task=SEQUENCE)
    jaxpeft.load(folder, task=SEQUENCE, num_labels=3)


@pytest.mark.parametrize(
    ("saved", "loaded"), [("token_classification", SEQUENCE), (SEQUENCE, "encoder")]
)
def test_the_head_of_another_task_is_left_out(reference, saved, loaded):
    labels = 4 if loaded == SEQUENCE else None
    model, params = jaxpeft.load(reference("roberta", saved).folder, task=loaded, num_labels=labels)
    assert jaxpeft.apply(model, params, [[5, 6, 7]]).shape[-1] == (4 if labels else 32)


def test_a_tied_head_that_differs_is_refused_and_one_alone_is_the_embedding(reference, tmp_path):
    tied = reference("llama", "causal_lm", tie_word_embeddings=True)
    other = edited(
        tied.folder,
        tmp_path / "a",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}),
    )
    with pytest.raises(
        WeightsError, match=r"ties the head to the embedding, but lm_head\.weight differs"
    ):
        jaxpeft.load(other, task="causal_lm")
    alone = edited(
        tied.folder,
        tmp_path / "b",
        lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}),
    )
    same = edited(
        tied.folder,
        tmp_path / "c",
        lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"]}),
    )
    for folder in (alone, same):
        assert_bit_equal(
            jaxpeft.load(folder, task="causal_lm")[1],
            jaxpeft.load(tied.folder, task="causal_lm")[1],
        )


def test_layers_of_several_dtypes_keep_their_numbers_when_stacked(reference, tmp_path):
    def halve(tensors):
        for name in [n for n in tensors if ".layer.0." in n]:
            tensors[name] = tensors[name].astype(np.float16)

    folder = edited(reference("bert", "encoder").folder, tmp_path / "m", weights=halve)
    stacked = jaxpeft.load(folder, task="encoder", scan_layers=True)[1]
    plain = jaxpeft.load(folder, task="encoder", scan_layers=False)[1]
    for path, leaf in paths.walk(unstack_layers(stacked)):
        np.testing.assert_array_equal(leaf, paths.get(plain, path).astype(leaf.dtype))


# ----------------------------------------------------------------------------------------- prefixes

FAMILIES = {
    "llama": ("llama", "causal_lm", "model."),
    "qwen3 classifier": ("qwen3", SEQUENCE, "model."),
    "qwen2 encoder": ("qwen2", "encoder", "model."),
    "bert": ("bert", SEQUENCE, "bert."),
    "roberta": ("roberta", "token_classification", "roberta."),
    "distilbert": ("distilbert", SEQUENCE, "distilbert."),
    "modernbert": ("modernbert", SEQUENCE, "model."),
    "deberta": ("deberta-v2", SEQUENCE, "deberta."),
}


@pytest.mark.parametrize(("kind", "task", "prefix"), FAMILIES.values(), ids=FAMILIES)
@pytest.mark.representatives("llama", "qwen*", "bert", "roberta", "distilbert")
def test_names_are_read_with_the_prefix_without_it_and_mixed(
    reference, tmp_path, kind, task, prefix
):
    folder = reference(kind, task).folder
    own = load_file(folder / "model.safetensors")
    _, wanted = jaxpeft.load(folder, task=task)
    plain = {name.removeprefix(prefix): tensor for name, tensor in own.items()}
    heads = ("score", "classifier", "pre_classifier", "lm_head", "head", "pooler")
    whole = {
        name if name.startswith(heads) else prefix + name: tensor for name, tensor in plain.items()
    }
    mixed = {name: tensor for i, (name, tensor) in enumerate(whole.items()) if i % 2} | {
        name.removeprefix(prefix): tensor
        for i, (name, tensor) in enumerate(whole.items())
        if not i % 2
    }
    for number, tensors in enumerate((plain, whole, mixed)):
        made = shutil.copytree(folder, tmp_path / str(number))
        save_file(tensors, made / "model.safetensors")
        _, params = jaxpeft.load(made, task=task)
        assert_bit_equal(params, wanted)


def test_two_tensors_for_one_place_are_refused(reference, tmp_path):
    def twice(tensors):
        tensors["layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].copy()

    folder = edited(reference("llama", "causal_lm").folder, tmp_path / "m", twice)
    with pytest.raises(
        WeightsError,
        match=r"twice: (model\.)?layers\.0\.mlp\.up_proj\.weight and (model\.)?layers\.0",
    ):
        jaxpeft.load(folder, task="causal_lm")
