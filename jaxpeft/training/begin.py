"""How a run begins: the base rewritten and split, with the start that a method takes from data, or as a checkpoint has it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.core import paths, training_hooks, tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import adapter_names, trainable_mask
from jaxpeft.methods import from_dict
from jaxpeft.sharding.processes import put
from jaxpeft.sharding.specs import shardings
from jaxpeft.training.setup import Setup
from jaxpeft.training.start import Start
from jaxpeft.transforms.rewrite import rewrite

Look = Callable[[Tree, Tree], object]


def _placed(setup: Setup, method: Method, params: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Split a rewritten tree into `(trainable, frozen)`, each leaf where the rules say.

    The trainable leaves are copies: the step is given them for good (they are donated), the base stays as it was.
    """
    where = shardings(setup.mesh, setup.rules, params, method)
    mask = trainable_mask(method, params)
    (trainable, frozen), (of_trainable, of_frozen) = tree.partition(params, mask), tree.partition(where, mask)
    copies = jax.tree.map(jnp.copy, put(trainable, of_trainable))
    return put(copies, of_trainable), put(frozen, of_frozen)


def rewritten(setup: Setup, method: Method) -> tuple[Tree, Tree]:
    """Rewrite the base and splits it, where its leaves are, or abstractly."""
    params = rewrite(method, setup.params, jax.random.key(setup.config.train.seed))
    return tree.partition(params, trainable_mask(method, params))


def begun(
    setup: Setup, method: Method, meta: Mapping[str, Any] | None, look: Look | None = None
) -> tuple[Method, Tree, Tree]:
    """Return what a run trains: `(method, trainable, frozen)`, with the start that the method takes from the data.

    The base is rewritten once: a fresh adapter may take decompositions of every kernel.

    Args:
        setup: the prepared run.
        method: as the config has it.
        meta: of the checkpoint that is gone on from: the method as it was started; None for a new run.
        look: is shown `(trainable, frozen)` with the fresh adapter, before a start from the data.
    """
    if meta is not None:
        method = method_of(meta, method)
    key = jax.random.key(setup.config.train.seed)
    fresh = rewrite(method, setup.params, key)
    split = _placed(setup, method, fresh)
    if look is not None:
        look(*split)
    if meta is not None:
        return (method, *split)
    run = Start(setup.model, setup.params, key, setup.tokenizer, partial(_first_batches, setup))
    started, params = training_hooks.start(method, fresh, run)
    return (started, *(split if params is fresh else _placed(setup, started, params)))


def method_of(meta: Mapping[str, Any], configured: Method) -> Method:
    """Return the method of a checkpoint as it was started.

    Args:
        meta: of the checkpoint.
        configured: the method of the config: what was trained where the checkpoint is of a version that records none.
    """
    return from_dict(meta["method"]) if "method" in meta else configured


def _first_batches(setup: Setup) -> Generator[Mapping[str, Any]]:
    """Yield the training batches from the first on, their parts one after the other."""
    with closing(setup.batches.feed({}, setup.steps, lambda: None)) as feed:
        for batch, _ in feed:
            if setup.config.train.accumulation == 1:
                yield batch
            else:
                for i in range(setup.config.train.accumulation):
                    yield {name: value[i] for name, value in batch.items()}


def fixed_leaves(method: Method, frozen: Tree) -> dict[str, jax.Array]:
    """Return the adapter leaves that are not trained, by path: what a checkpoint must hold beside the trained ones.

    They were made from the base, from data, or from a key, which another machine may do otherwise. Scalars follow from the
    method's options.
    """
    own = adapter_names(method)
    return {
        paths.text(path): leaf
        for path, leaf in paths.walk(frozen)
        if path[-1] in own and leaf.ndim > (paths.layer_axis(path) is not None)
    }
