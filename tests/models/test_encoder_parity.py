"""Encoders give the numbers of transformers, switch by switch."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from jaxpeft.errors import DataError

SEQUENCES, TOKENS, HIDDEN = "sequence_classification", "token_classification", "encoder"

ENCODERS = (
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "electra",
    "distilbert",
    "modernbert",
    "deberta-v2",
)

_BERT_SWITCHES: list[tuple[str, dict[str, Any]]] = [
    ("hidden-act", {"hidden_act": "relu"}),
    ("gelu-new", {"hidden_act": "gelu_new"}),
    ("one-type", {"type_vocab_size": 1}),
    ("eps", {"layer_norm_eps": 0.1}),
    ("pad-token", {"pad_token_id": 5}),
    (
        "dropouts",
        {
            "hidden_dropout_prob": 0.3,
            "attention_probs_dropout_prob": 0.3,
            "classifier_dropout": 0.4,
        },
    ),
    ("chunked", {"chunk_size_feed_forward": 4}),
]
_BIASES = ("norm_bias", "attention_bias", "mlp_bias", "classifier_bias")
_SLIDING = "sliding_attention"
_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 50.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("bert", name, switches) for name, switches in _BERT_SWITCHES),
    *(("roberta", name, switches) for name, switches in _BERT_SWITCHES),
    *(("xlm-roberta", name, switches) for name, switches in _BERT_SWITCHES),
    *(("electra", name, switches) for name, switches in _BERT_SWITCHES),
    ("electra", "wide", {"embedding_size": 32}),
    ("modernbert", "biases", dict.fromkeys(_BIASES, True)),
    ("modernbert", "acts", {"hidden_activation": "relu", "classifier_activation": "gelu_new"}),
    ("modernbert", "eps", {"norm_eps": 0.1}),
    ("modernbert", "no-window", {"global_attn_every_n_layers": 1}),
    ("modernbert", "wide-window", {"local_attention": 13}),
    (
        "modernbert",
        "layer-types",
        {"layer_types": [_SLIDING, _SLIDING, "full_attention"] * 2, "num_hidden_layers": 6},
    ),
    ("modernbert", "thetas", {"global_rope_theta": 50.0, "local_rope_theta": 7.0}),
    ("modernbert", "ropes", {"rope_parameters": _ROPES}),
    (
        "modernbert",
        "dropouts",
        {"attention_dropout": 0.3, "mlp_dropout": 0.3, "embedding_dropout": 0.3},
    ),
    *(
        ("deberta-v2", name, switches)
        for name, switches in (
            ("acts", {"hidden_act": "relu", "pooler_hidden_act": "tanh"}),
            ("eps", {"layer_norm_eps": 0.1}),
            ("absolute", {"position_biased_input": True}),
            ("types", {"type_vocab_size": 2}),
            ("own-projections", {"share_att_key": False}),
            ("c2p", {"pos_att_type": "c2p"}),
            ("p2c", {"pos_att_type": ["p2c"], "share_att_key": False}),
            ("plain-table", {"norm_rel_ebd": "none"}),
            ("no-buckets", {"position_buckets": -1, "max_relative_positions": 5}),
            ("many-buckets", {"position_buckets": 64, "max_relative_positions": 24}),
            ("absolute-only", {"relative_attention": False, "position_biased_input": True}),
            ("narrow", {"embedding_size": 16, "position_biased_input": True}),
            ("conv", {"conv_kernel_size": 3, "conv_act": "gelu"}),
            ("conv-groups", {"conv_kernel_size": 5, "conv_groups": 4}),
            (
                "dropouts",
                {"hidden_dropout_prob": 0.3, "pooler_dropout": 0.3, "cls_dropout": 0.2},
            ),
        )
    ),
    ("distilbert", "activation", {"activation": "relu"}),
    ("distilbert", "sinusoidal", {"sinusoidal_pos_embds": True}),
    ("distilbert", "pad-token", {"pad_token_id": 5}),
    (
        "distilbert",
        "dropouts",
        {"dropout": 0.3, "attention_dropout": 0.3, "seq_classif_dropout": 0.4},
    ),
]


@pytest.mark.parametrize("task", [SEQUENCES, TOKENS, HIDDEN])
@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.representatives("bert-token_classification", "distilbert-sequence_classification")
def test_every_task(parity, kind, task):
    parity(kind, task)


@pytest.mark.parametrize(
    ("kind", "switches"), [pytest.param(k, s, id=f"{k}-{n}") for k, n, s in CASES]
)
@pytest.mark.representatives(
    "roberta-pad-token",
    "bert-one-type",
    "distilbert-activation",
    "electra-hidden-act",
    "modernbert-ropes",
    "deberta-v2-conv-groups",
)
def test_a_sequence_classifier_with_a_switch(parity, kind, switches):
    parity(kind, SEQUENCES, **switches)


@pytest.mark.slow
def test_the_first_token_of_a_modernbert(reference, padded):
    torch_model = reference("modernbert", SEQUENCES, classifier_pooling="cls")
    model, params = torch_model.load()
    assert model.options.pooling == "cls"
    assert torch_model.difference(padded[:2], model, params) <= 1e-4


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.representatives("bert")
def test_token_types(parity, padded, kind):
    types = (np.arange(padded[0].ids.shape[1]) > 5).astype(np.int32)[None].repeat(3, 0)
    parity(kind, TOKENS, inputs={"token_type_ids": types})


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "modernbert"])
@pytest.mark.representatives("roberta")
def test_position_ids(parity, padded, kind):
    positions = (np.arange(padded[0].ids.shape[1])[None] + np.array([[2], [5], [20]])).astype(
        np.int32
    )
    parity(kind, TOKENS, inputs={"position_ids": positions})


def _pooled(hidden, mask, how):
    if how == "cls":
        return hidden[:, 0]
    return ((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdims=True)).astype(np.float32)


def _linear(module, x):
    import torch

    with torch.no_grad():
        return module(torch.tensor(np.asarray(x))).numpy()


def _head(model, kind, x):
    if kind == "roberta":
        return _linear(model.classifier.out_proj, np.tanh(_linear(model.classifier.dense, x)))
    if kind == "distilbert":
        x = np.maximum(_linear(model.pre_classifier, x), 0)
    return _linear(model.classifier if kind in ("bert", "distilbert") else model.score, x)


@pytest.mark.parametrize("how", ["cls", "mean"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "llama"])
@pytest.mark.representatives("bert-cls", "roberta-mean")
def test_pooling(reference, padded, kind, how):
    import jaxpeft

    torch_model = reference(kind, SEQUENCES)
    model, params = torch_model.load(pooling=how)
    assert "pooler" not in params.get("bert", {})
    backbone = torch_model.model.model if kind == "llama" else getattr(torch_model.model, kind)
    for batch in padded:
        import torch

        with torch.no_grad():
            given = {
                "input_ids": torch.tensor(batch.ids).long(),
                "attention_mask": torch.tensor(batch.mask),
            }
            hidden = backbone(**given).last_hidden_state.numpy()
        wanted = _head(torch_model.model, kind, _pooled(hidden, batch.mask, how))
        rows = batch.mask[:, 0].astype(bool) if how == "cls" else slice(None)
        ours = np.asarray(jaxpeft.apply(model, params, batch.ids, batch.mask))
        np.testing.assert_allclose(ours[rows], wanted[rows], atol=1e-4)


def test_the_poolers_weights_are_not_built_where_they_are_not_read(reference):
    _, params = reference("bert", HIDDEN).load()
    assert set(params) == {"embeddings", "encoder"}


def test_the_tensor_names_of_old_tensorflow_checkpoints(reference, padded, tmp_path):
    from safetensors.numpy import load_file, save_file

    torch_model = reference("bert", SEQUENCES)
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in load_file(torch_model.folder / "model.safetensors").items()
    }
    old["cls.predictions.bias"] = np.zeros(3, np.float32)
    old["bert.embeddings.position_ids"] = np.arange(3)
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((torch_model.folder / "config.json").read_text())
    moved = type(torch_model)(tmp_path, torch_model.task, torch_model.model)
    assert moved.difference(padded, *moved.load()) <= 1e-4


@pytest.mark.parametrize(("kind", "most"), [("bert", 40), ("roberta", 38), ("distilbert", 40)])
@pytest.mark.representatives("roberta-38")
def test_a_row_longer_than_the_position_table_is_refused(reference, kind, most):
    import jaxpeft

    model, params = reference(kind, SEQUENCES).load()
    longest = np.full((1, most), 7, np.int32)
    assert jax.eval_shape(lambda: jaxpeft.apply(model, params, longest)).shape == (1, 3)
    with pytest.raises(
        DataError, match=f"row has {most + 1} tokens, but the .* model supports at most {most}"
    ):
        jaxpeft.apply(model, params, np.full((1, most + 1), 7, np.int32))
