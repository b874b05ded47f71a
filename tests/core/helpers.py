"""What the tests of the mechanism share: tiny random models without torch, and comparisons of
trees.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft
from jaxpeft import models
from jaxpeft.core import paths
from jaxpeft.models.base import ModelOptions
from tests.models.conftest import LABELS, Batch, forward, make_batch, tiny_config

BATCH: Batch = make_batch("right")
TASKS = {"llama": "causal_lm", "bert": "sequence_classification"}
CLASSIFIER = "sequence_classification"
QUICK = {"xla_backend_optimization_level": 0}  # programs with gradients compile in half the time


@functools.cache
def unrolled(kind: str, task: str) -> Any:
    """Return float32 params of a tiny unrolled model, every leaf random: zero biases would hide
    what is left out.
    """
    model = make(kind, task)
    tree = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4), jnp.int32))[
        "params"
    ]
    rng = np.random.default_rng(0)

    def fill(path: Any, leaf: Any) -> Any:
        noise = (0.2 if leaf.ndim > 1 else 0.1) * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise + (path[-1] == "scale"), jnp.float32)

    return paths.map_with_path(fill, tree)


def make(kind: str, task: str | None = None, dtype: Any = jnp.float32, **options: Any) -> Any:
    task = task or TASKS[kind]
    labels = LABELS if "classification" in task else None
    return models.build(
        tiny_config(kind), ModelOptions(task=task, num_labels=labels, dtype=dtype, **options)
    )


def load(
    kind: str = "llama", task: str | None = None, dtype: Any = jnp.float32, **options: Any
) -> Any:
    """Return `(model, params)` as `jaxpeft.load` would: the head float32, the base in `dtype`."""
    task = task or TASKS[kind]
    params = unrolled(kind, task)
    if options.get("scan_layers"):
        params = jaxpeft.stack_layers(params)
    model = make(kind, task, dtype, **options)
    return model, paths.map_with_path(
        lambda path, x: x if paths.is_head(path) else x.astype(dtype), params
    )


def run(model: Any, params: Any, rngs: Any = None) -> Any:
    """Return the logits of `BATCH`, compiled."""
    return forward(model, params, BATCH.ids, BATCH.mask, None if rngs is None else {"rngs": rngs})


def perturbed(method: Any, params: Any, seed: int = 0, size: float = 0.2) -> Any:
    """Add noise to the adapter leaves that are trained, as training would; zero padding stays
    zero.
    """
    rng = np.random.default_rng(seed)

    def change(path: Any, leaf: Any) -> Any:
        if path[-1] not in method.leaves.trained:
            return leaf
        used = np.any(np.asarray(paths.get(params, path[:-1])["lora_a"]) != 0, axis=-2)
        used = used[..., None, :] if path[-1] == "lora_a" else used[..., None]
        return leaf + jnp.asarray(size * rng.standard_normal(leaf.shape) * used, leaf.dtype)

    return paths.map_with_path(change, params)


def leaves(tree: Any) -> dict[str, Any]:
    return {paths.text(path): leaf for path, leaf in paths.walk(tree)}


def names(tree: Any, suffix: str) -> set[str]:
    """Return the paths of the leaves that end with a name."""
    return {name for name in leaves(tree) if name.split("/")[-1] == suffix}


def assert_bits(a: Any, b: Any) -> None:
    """Two trees have the same paths, shapes, dtypes and bits."""
    ours, theirs = leaves(a), leaves(b)
    assert ours.keys() == theirs.keys()
    for name, leaf in ours.items():
        one, other = np.asarray(leaf), np.asarray(theirs[name])
        assert (one.dtype, one.shape) == (other.dtype, other.shape), name
        assert one.tobytes() == other.tobytes(), name


def largest(a: Any, b: Any) -> float:
    """Return the largest difference of two trees or arrays."""
    gaps = jax.tree.map(
        lambda x, y: float(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max()),
        a,
        b,
    )
    return max(jax.tree.leaves(gaps))
