"""Every file in configs/: it is valid, says how it is run, and its step can be traced from shapes
alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import config as configs
from jaxpeft import models
from jaxpeft.config.schema import Config
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.core.tree import count, partition
from jaxpeft.errors import WeightsError
from jaxpeft.hub import sources
from jaxpeft.models.base import ModelOptions, abstract_params
from jaxpeft.train import optimizers
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import init_state, make_train_step
from jaxpeft.transforms.rewrite import rewrite

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
LABELS = 77
LLAMA_31_8B: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
STORIES_260K: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MINILM: Mapping[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
BERT_BASE: Mapping[str, Any] = {
    "model_type": "bert",
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}
ABSENT = {
    "imdb_bert_full": BERT_BASE,
    "llama3_8b_lora": LLAMA_31_8B,
    "stories_lora": STORIES_260K,
    "wikisql_lora": STORIES_260K,
}
TRAINABLE: Mapping[str, int | Mapping[str, int]] = {
    "quickstart": {"head": 29_645, "lora": 693_197},  # rank 16 on 36 sites, and a head of 77 labels
    "banking77_minilm_lora": 693_197,
    "bert_full": 22_595_021,
    "imdb_bert_full": 109_541_453,  # the 109,482,240 of bert-base-uncased, and a head of 77 labels
    "stories_lora": 92_480,
    "wikisql_lora": 184_960,  # of twice the rank
    "llama3_8b_lora": (
        41_943_040
    ),  # the figure that torch peft prints for rank 16 on all linear layers
    "compare_banking77": {
        "full": 22_595_021,
        "lora": 693_197,
        "dora": 713_933,
        "adapter": 142_685,
        "prefix": 1_959_245,
        "ptuning_v2": 121_805,
        "ia3": 45_773,
        "bitfit": 55_373,
        "head": 29_645,
    },
}


def model_config(config: Config, name: str) -> Mapping[str, Any]:
    """Return the model's own config.json where the model is on this machine, and what is known of
    it elsewhere.
    """
    if name == "llama3_8b_lora":
        return LLAMA_31_8B
    try:
        return json.loads((sources.resolve(config.model.path).folder / "config.json").read_text())
    except WeightsError:
        return ABSENT.get(name, MINILM)


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    parts, rows, length = config.train.accumulation, config.train.batch_size, config.data.max_length
    lead = (rows,) if parts == 1 else (parts, rows // parts)
    ids = jax.ShapeDtypeStruct((*lead, length), jnp.int32)
    labels = ids if config.model.task == "causal_lm" else jax.ShapeDtypeStruct(lead, jnp.int32)
    weights = jax.ShapeDtypeStruct(lead, jnp.float32)
    return {"input_ids": ids, "attention_mask": ids, "labels": labels, "weights": weights}


def runs() -> Iterator[Any]:
    """Return every config with each method that it trains."""
    for path in FILES:
        config = configs.load(str(path), [])
        if not config.compare.candidates:
            yield pytest.param(path, config, TRAINABLE[path.stem], id=path.stem)
        for candidate in config.compare.candidates:
            own, counts = config.run_of(candidate, 0), TRAINABLE[path.stem]
            assert isinstance(counts, Mapping)
            yield pytest.param(
                path, own, counts[candidate.title], id=f"{path.stem}-{candidate.title}"
            )


@pytest.mark.parametrize(("path", "config", "trainable_parameters"), list(runs()))
@pytest.mark.representatives(
    "quickstart-lora",
    "stories_lora",
    "wikisql_lora",
    "bert_full",
    "compare_banking77-prefix",
    "compare_banking77-head",
)
def test_the_config_is_valid_and_its_step_can_be_traced(
    path: Path, config: Config, trainable_parameters: int
) -> None:
    dtype = jnp.dtype("float32" if config.model.dtype == "auto" else config.model.dtype)
    labels = None if config.model.task == "causal_lm" else LABELS
    remat = "products" if config.model.remat == "auto" else config.model.remat
    options = ModelOptions(
        config.model.task,
        labels,
        dtype,
        bool(config.model.scan_layers),
        config.model.pooling,
        remat,
    )
    model = models.build(model_config(config, path.stem), options)
    base = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), abstract_params(model)
    )

    params = jax.eval_shape(lambda tree: rewrite(config.method, tree, jax.random.key(0)), base)
    trainable, frozen = partition(params, trainable_mask(config.method, params))
    optimizer = optimizers.build(optimizers.options_for(config), 1000, config.method)
    state = jax.eval_shape(lambda tree: init_state(tree, optimizer, 0), trainable)
    loss = loss_for(config.model.task, "single_label")
    step = make_train_step(model, loss, optimizer, config.train.accumulation)
    after, metrics = jax.eval_shape(step, state, frozen, abstract_batch(config))

    assert count(trainable) == trainable_parameters
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), state
    )
    assert {name: value.shape for name, value in metrics.items()} == {
        "loss": (),
        "weight": (),
        "grad_norm": (),
        "broken": (len(jax.tree.leaves(trainable)),),
        "tokens": (),
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_config_opens_with_how_it_is_run_and_what_to_expect(path: Path) -> None:
    opening = path.read_text().split('"""')[1]
    for field in ("Command:", "Data:", "Model:", "Hardware:", "Time:", "Expected:"):
        assert f"\n{field}" in opening
    assert f"configs/{path.name}" in opening
