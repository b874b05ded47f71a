"""Configs that cannot be of the weights beside them, and values that no config has."""

from __future__ import annotations

import json
import time

import pytest

import jaxpeft
from jaxpeft.errors import JaxpeftError
from jaxpeft.hub.loading import outline
from jaxpeft.hub.model_request import ModelRequest
from tests.hub.helpers import edited

SIZES = {
    "layers": (
        "llama",
        {"num_hidden_layers": 9_999},
        r"/config\.json: num_hidden_layers is 9999, but there are only 2 layers in the weights",
    ),
    "layers of distilbert": (
        "distilbert",
        {"n_layers": 5_000},
        r"/config\.json: n_layers is 5000, but there are only 2 layers in the weights",
    ),
    "vocabulary": (
        "qwen3",
        {"vocab_size": 16_000_000},
        r"vocab_size is 16000000, but there are only 99 in model\.embed_tokens\.weight",
    ),
    "width": (
        "mistral",
        {"hidden_size": 1 << 20},
        r"hidden_size is 1048576, but there are only \d+ in model\.embed_tokens\.weight",
    ),
    "width of distilbert": (
        "distilbert",
        {"dim": 1 << 20},
        r"dim is 1048576, but there are only \d+ in distilbert\.embeddings\.word",
    ),
    "too many layers": (
        "bert",
        {"num_hidden_layers": 10**9},
        r"num_hidden_layers: must be an integer of at most 10000, is 1000000000",
    ),
    "positions": (
        "roberta",
        {"max_position_embeddings": 10**9},
        r"max_position_embeddings: must be an integer of at most \d+, is 10",
    ),
    "positions in the file": (
        "bert",
        {"max_position_embeddings": 1 << 20},
        r"misshaped: bert\.embeddings\.position_embeddings\.weight",
    ),
    "inner width": (
        "llama",
        {"intermediate_size": 1 << 24},
        r"misshaped: model\.layers\.0\.mlp\.\w+\.weight is",
    ),
    "labels": (
        "bert",
        {"id2label": None, "num_labels": 10**9},
        r"num_labels: must be at most 1000000, is 1000000000",
    ),
}


@pytest.mark.parametrize(("kind", "change", "message"), SIZES.values(), ids=SIZES)
def test_a_config_that_is_larger_than_the_weights_is_refused_at_once(
    reference, tmp_path, kind, change, message
):
    task = "causal_lm" if kind in ("llama", "mistral", "qwen3") else "sequence_classification"
    folder = edited(reference(kind, task).folder, tmp_path / "m", config=lambda c: c.update(change))
    began = time.perf_counter()
    with pytest.raises(JaxpeftError, match=message):
        jaxpeft.load(folder, task=task)
    assert time.perf_counter() - began < 5


VALUES = [[], [8], {}, True, "8", None, -1, 0, 2.5, float("nan"), float("inf"), 10**40, "x" * 10**6]
FIELDS = [
    (
        "llama",
        (
            "hidden_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "rms_norm_eps",
            "rope_parameters",
            "hidden_act",
            "max_position_embeddings",
            "pad_token_id",
            "tie_word_embeddings",
            "head_dim",
        ),
    ),
    (
        "bert",
        (
            "hidden_size",
            "num_attention_heads",
            "type_vocab_size",
            "layer_norm_eps",
            "hidden_act",
            "id2label",
        ),
    ),
    ("distilbert", ("dim", "n_heads", "n_layers", "activation", "dropout")),
]


@pytest.mark.parametrize(
    ("kind", "field"), [(kind, field) for kind, fields in FIELDS for field in fields]
)
@pytest.mark.representatives("llama-*", "distilbert-*", "bert-[!i]*")
def test_no_value_of_config_json_ends_in_anothers_error(reference, tmp_path, kind, field):
    task = "causal_lm" if kind == "llama" else "sequence_classification"
    folder = edited(reference(kind, task).folder, tmp_path / "m")
    own, refused = json.loads((folder / "config.json").read_text()), list[int]()
    for value in VALUES:
        (folder / "config.json").write_text(json.dumps(own | {field: value}))
        try:
            outline(folder, ModelRequest(task))
        except JaxpeftError as error:
            refused.append(max(map(len, error.problems)))
    assert len(refused) >= 5
    assert max(refused) < 600 + len(str(folder))
