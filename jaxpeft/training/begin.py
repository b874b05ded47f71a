"""How a run begins: the base rewritten and split, with the start that a method takes from data, or as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths, tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import adapter_names, trainable_mask
from jaxpeft.methods import from_dict
from jaxpeft.sharding.processes import put
from jaxpeft.sharding.specs import shardings
from jaxpeft.training.setup import Setup
from jaxpeft.training.start import Start
from jaxpeft.transforms.rewrite import rewrite


def split_for(setup: Setup, method: Method) -> tuple[Tree, Tree]:
    """Rewrites the base and splits it: `(trainable, frozen)`.

    The trainable leaves are copies: the step is given them for good (they are donated), the base stays as it was.
    """
    return _placed(setup, method, rewrite(method, setup.params, jax.random.key(setup.config.train.seed)))


def _placed(setup: Setup, method: Method, params: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Splits a rewritten tree, each leaf where the rules say."""
    where = shardings(setup.mesh, setup.rules, params, method)
    mask = trainable_mask(method, params)
    (trainable, frozen), (of_trainable, of_frozen) = tree.partition(params, mask), tree.partition(where, mask)
    copies = jax.tree.map(jnp.copy, put(trainable, of_trainable))
    return put(copies, of_trainable), put(frozen, of_frozen)


def rewritten(setup: Setup, method: Method) -> tuple[Tree, Tree]:
    """Rewrites the base and splits it, where its leaves are, or abstractly."""
    params = rewrite(method, setup.params, jax.random.key(setup.config.train.seed))
    return tree.partition(params, trainable_mask(method, params))


def begun(setup: Setup, method: Method, meta: Mapping[str, Any] | None) -> tuple[Method, Tree, Tree]:
    """Gives what a run trains: `(method, trainable, frozen)`, with the start that the method takes from the data.

    Args:
        setup: the prepared run.
        method: as the config has it.
        meta: of the checkpoint that is gone on from: the method as it was started; None for a new run.
    """
    if meta is not None:
        method = method_of(meta, method)
        return (method, *split_for(setup, method))
    key = jax.random.key(setup.config.train.seed)
    run = Start(setup.model, setup.params, key, setup.tokenizer, partial(_first_batches, setup))
    method, params = method.start(rewrite(method, setup.params, key), run)
    return (method, *_placed(setup, method, params))


def method_of(meta: Mapping[str, Any], configured: Method) -> Method:
    """Gives the method of a checkpoint as it was started.

    Args:
        meta: of the checkpoint.
        configured: the method of the config: what was trained where the checkpoint is of a version that records none.
    """
    return from_dict(meta["method"]) if "method" in meta else configured


def _first_batches(setup: Setup) -> Generator[Mapping[str, Any]]:
    """Yields the training batches from the first on, their parts one after the other."""
    with closing(setup.batches.feed({}, setup.steps, lambda: None)) as feed:
        for batch, _ in feed:
            if setup.config.train.accumulation == 1:
                yield batch
            else:
                for i in range(setup.config.train.accumulation):
                    yield {name: value[i] for name, value in batch.items()}


def fixed_leaves(method: Method, frozen: Tree) -> dict[str, jax.Array]:
    """Gives the adapter leaves that are not trained, by path: what a checkpoint must hold beside the trained ones.

    They were made from the base, from data, or from a key, which another machine may do otherwise. Scalars follow from the
    method's options.
    """
    own = adapter_names(method)
    return {
        paths.text(path): leaf
        for path, leaf in paths.walk(frozen)
        if path[-1] in own and leaf.ndim > (paths.layer_axis(path) is not None)
    }
