"""The same loss and gradients under every sharding:
`python -m benchmarks.strategies [--devices 1,2,4,8]`, on simulated CPU devices.

For a tiny model in float32, computes the loss and the gradients of one batch under every strategy
and on every number of devices, and compares them with those of one device. The table has the
largest difference, relative to the largest number of each leaf's gradient.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft import models
from jaxpeft.config.data_config import DataConfig
from jaxpeft.config.schema import Config
from jaxpeft.config.train_config import TrainConfig
from jaxpeft.core import tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.hub.fetching import fetch_kernels
from jaxpeft.methods import METHODS
from jaxpeft.models.base import ModelOptions, Pretrained, abstract_params
from jaxpeft.processes.arrays import put_batch
from jaxpeft.quant.quantize import quantize
from jaxpeft.sharding.layout import layout
from jaxpeft.sharding.logical_axes import on_mesh
from jaxpeft.sharding.mesh import heads_of, make_mesh
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.sharding.sizes import SEQUENCE, STRATEGIES
from jaxpeft.train.losses import loss_for
from jaxpeft.train.step import make_loss_sum
from jaxpeft.transforms.rewrite import rewrite

ROWS, LENGTH, VOCAB = 8, 64, 96
LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
BERT: Mapping[str, Any] = {
    "model_type": "bert",
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Case:
    """One computation to compare.

    Attributes:
        architecture: content of a `config.json`.
        method: fine-tuning method.
        quant: number format of the base, None for no quantization.
        packed: whether rows contain several documents.
        scan: whether layers are scanned.
        dropout: whether it is a training call.
    """

    architecture: Mapping[str, Any]
    method: Method
    quant: str | None = None
    packed: bool = False
    scan: bool = True
    dropout: bool = False


CASES: Mapping[str, Case] = {
    "lora": Case(LLAMA, METHODS["lora"](rank=4)),
    "lora, packed": Case(LLAMA, METHODS["lora"](rank=4), packed=True),
    "adapter": Case(LLAMA, METHODS["adapter"](reduction_factor=8.0)),
    "prefix": Case(LLAMA, METHODS["prefix"](num_virtual_tokens=5)),
    "lora on nf4": Case(LLAMA, METHODS["lora"](rank=4), quant="nf4"),
    "lora, unrolled": Case(LLAMA, METHODS["lora"](rank=4, dropout=0.1), scan=False, dropout=True),
    "full": Case(LLAMA, METHODS["full"]()),
    "lora, bert": Case(BERT, METHODS["lora"](rank=4)),
}
"""By what the table calls them."""


def prepared(case: Case) -> tuple[Pretrained, Tree, dict[str, np.ndarray[Any, Any]]]:
    """Return model, rewritten parameters and a batch of a case, from fixed seeds."""
    decoder = case.architecture["model_type"] == "llama"
    task, labels = ("causal_lm", None) if decoder else ("sequence_classification", 3)
    model = models.build(
        case.architecture, ModelOptions(task, labels, jnp.float32, scan_layers=case.scan)
    )
    rng = np.random.default_rng(0)
    # a norm's scale about 1, as it is in models: about 0 each layer would shrink its input, and the
    # gradients of queries to rounding
    base = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.normal(path[-1].key == "scale", 0.1, leaf.shape), jnp.float32
        ),
        abstract_params(model),
    )
    base = quantize(base, case.quant) if case.quant else base
    params = rewrite(case.method, base, jax.random.key(0))
    flags = trainable_mask(case.method, params)
    # away from zero, where an adapter begins: else half of the gradients would be zeros
    moved = jax.tree.map(
        lambda leaf, on: (
            leaf + jnp.asarray(rng.normal(0, 0.05, leaf.shape), leaf.dtype) if on else leaf
        ),
        params,
        flags,
    )
    return model, moved, _batch(rng, decoder=decoder, packed=case.packed)


def _batch(
    rng: np.random.Generator, *, decoder: bool, packed: bool
) -> dict[str, np.ndarray[Any, Any]]:
    ids = rng.integers(1, VOCAB, (ROWS, LENGTH)).astype(np.int32)
    lengths = rng.integers(LENGTH // 2, LENGTH + 1, ROWS)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int32)
    batch = {"input_ids": ids * mask, "attention_mask": mask, "weights": np.ones(ROWS, np.float32)}
    if not decoder:
        return batch | {"labels": rng.integers(0, 3, ROWS).astype(np.int32)}
    batch["labels"] = np.where((mask > 0) & (rng.random(ids.shape) < 0.7), ids, -100).astype(
        np.int32
    )
    if packed:
        cuts = np.sort(rng.integers(1, LENGTH, (ROWS, 3)), axis=1)
        batch["segment_ids"] = (
            (np.arange(LENGTH)[None, :, None] >= cuts[:, None, :]).sum(-1).astype(np.int32)
        )
    return batch


def computed(case: Case, options: MeshConfig, devices: int) -> tuple[float, float, Tree]:
    """Compute loss, weight and gradients of a case on a mesh:
    `(sum of the loss, weight, gradients)`, on the host.
    """
    model, params, batch = prepared(case)
    mesh = mesh_of(options, devices)
    found = layout(mesh, sharding_rules(options), params, case.method)
    if mesh.shape[SEQUENCE] > 1:  # as the main job does
        model = model.clone(options=dataclasses.replace(model.options, attention="chunked"))
    loss = make_loss_sum(fetch_kernels(model, found), loss_for(model.options.task, "single_label"))
    mask = trainable_mask(case.method, params)
    trainable, frozen = tree.partition(jax.device_put(params, found.shardings), mask)
    key = jax.random.key(1) if case.dropout else None
    run: Callable[..., Any] = jax.jit(on_mesh(mesh, jax.value_and_grad(loss, has_aux=True)))
    (total, weight), grads = run(trainable, frozen, put_batch(mesh, batch), key)
    return float(total), float(weight), jax.tree.map(np.asarray, grads)


def mesh_of(options: MeshConfig, devices: int) -> Mesh:
    """Return the mesh of the first devices, up to a number."""
    config = Config(
        mesh=options,
        train=TrainConfig(batch_size=ROWS, steps=1),
        data=DataConfig(max_length=LENGTH),
    )
    return make_mesh(config, jax.devices()[:devices], heads_of(LLAMA))


def difference(one: tuple[float, float, Tree], other: tuple[float, float, Tree]) -> float:
    """Return the largest relative difference of two results: of the losses, and of each leaf's
    gradient relative to its largest number.
    """
    found = [abs(one[0] - other[0]) / abs(one[0]), abs(one[1] - other[1])]
    for a, b in zip(jax.tree.leaves(one[2]), jax.tree.leaves(other[2]), strict=True):
        found.append(
            float(np.max(np.abs(a - b), initial=0) / max(float(np.max(np.abs(a), initial=0)), 1e-6))
        )
    return max(found)


def options_of(strategy: str, devices: int) -> MeshConfig:
    """Return the mesh options of a strategy on a number of devices: hybrid strategies in two
    groups, long rows over at most 8.
    """
    slices = 2 if strategy == "hybrid_fsdp" and devices > 1 else 1
    return MeshConfig(strategy=strategy, slices=slices)  # pyright: ignore[reportArgumentType]


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", default="1,2,4,8", help="numbers of devices")
    parser.add_argument(
        "--cases", default="lora, packed;adapter;prefix;lora on nf4", help=f"of {'; '.join(CASES)}"
    )
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    given = parser.parse_args(argv)
    counts = [int(n) for n in given.devices.split(",")]
    print(f"{'':<18}{'strategy':<14}" + "".join(f"{n:>10}" for n in counts) + "   devices")
    for name in given.cases.split(";"):
        one = computed(CASES[name], MeshConfig(), 1)
        for strategy in given.strategies.split(","):
            row = (
                difference(one, computed(CASES[name], options_of(strategy, n), n)) for n in counts
            )
            print(
                f"{name:<18}{strategy:<14}" + "".join(f"{value:>10.1e}" for value in row),
                flush=True,
            )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
