"""Start or resume a run: inject adapters into the base, partition the tree, and apply a method's
data-dependent initialization or restore a checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.checkpoint.identity import tree_spec
from jaxpeft.checkpoint.manager import Checkpoints
from jaxpeft.config.train_config import OptimizerConfig
from jaxpeft.core import paths, training_hooks, tree
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import adapter_names, chosen_sites, trainable_mask
from jaxpeft.core.targets import find_sites
from jaxpeft.logs import log_time
from jaxpeft.methods import from_dict
from jaxpeft.processes.arrays import put
from jaxpeft.processes.signals import StopRequest
from jaxpeft.sharding.layout import shardings, state_shardings
from jaxpeft.train import base_record, optimizers, records, run_record
from jaxpeft.train.data_start import Start
from jaxpeft.train.evaluator import Evaluator
from jaxpeft.train.run import EvaluationProgress, LoopState, Run
from jaxpeft.train.setup import Setup
from jaxpeft.train.step import TrainState, init_state
from jaxpeft.train.step_metrics import StepMetrics
from jaxpeft.transforms.rewrite import rewrite

_log = logging.getLogger(__name__)
Look = Callable[[Tree, Tree], object]


def begin(
    setup: Setup,
    method: Method,
    options: OptimizerConfig,
    folder: Path,
    stop: StopRequest,
    evaluator: Evaluator,
    allowed: Sequence[str] = (),
    look: Look | None = None,
) -> tuple[Run, LoopState]:
    """Return a run and its state before the next step, restored from the newest checkpoint if one
    exists.

    Args:
        setup: prepared run.
        method: method to train.
        options: optimizer options.
        folder: folder for checkpoints and metrics.
        stop: stop request, checked before each step.
        evaluator: evaluator of the setup.
        allowed: fields that may differ from the checkpoint's.
        look: called with both parts of the tree before any training.

    Raises:
        ConfigError: the checkpoints belong to another run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints = Checkpoints(folder / "checkpoints", setup.config.checkpoint.keep, setup.peers)
    latest = checkpoints.latest()
    meta = None if latest is None else checkpoints.read_meta(latest)
    started, trainable, frozen = initialize(setup, method, meta, look)
    optimizer = optimizers.build(options, setup.steps, started)
    fresh = init_state(trainable, optimizer, setup.config.train.seed)
    where = state_shardings(
        setup.mesh, fresh, trainable, jax.tree.map(lambda leaf: leaf.sharding, trainable)
    )
    state = LoopState(put(fresh, where))
    identity = identity_of(setup, method, trainable)
    if latest is not None:
        checkpoints.check_identity(latest, identity, allowed)
    checkpoints.put_aside(latest)
    if latest is not None:
        with log_time(f"restoring step {latest} from {folder / 'checkpoints'}"):
            state, frozen = _restore(checkpoints, latest, state, started, frozen)
    trained, total = tree.count(trainable), tree.count(trainable) + tree.count(frozen)
    _log.info(
        "%s trains %s of %s parameters (%.2f%%)",
        started.name,
        f"{trained:,}",
        f"{total:,}",
        100 * trained / total,
    )
    _report_experts(started, trainable, frozen)
    writers = _open_records(setup, folder, state.step, trained, total)
    rate = optimizers.schedule(options, options.learning_rate, setup.steps)
    newest = partial(_newest, checkpoints)
    metrics = StepMetrics(
        setup, started.name, rate, trainable, frozen, writers, newest, state.progress.seconds
    )
    return (
        Run(
            setup,
            started,
            optimizer,
            frozen,
            where,
            identity,
            checkpoints,
            evaluator,
            metrics,
            stop,
        ),
        state,
    )


def _restore(
    checkpoints: Checkpoints, step: int, state: LoopState, method: Method, frozen: Tree
) -> tuple[LoopState, Tree]:
    """Return the state of a checkpoint, and the frozen tree with the leaves that it saves."""
    train, best, fixed = checkpoints.restore(
        step, state.train, state.train.trainable, fixed_leaves(method, frozen)
    )
    frozen = paths.map_with_path(lambda path, leaf: fixed.get(paths.text(path), leaf), frozen)
    meta = checkpoints.read_meta(step)
    progress, position = EvaluationProgress(**meta["progress"]), meta["position"]
    restored = dataclasses.replace(
        state, train=TrainState(*train), step=step, position=position, progress=progress, best=best
    )
    return restored, frozen


def _open_records(
    setup: Setup, folder: Path, step: int, trained: int, total: int
) -> list[records.Writer]:
    """Record the run in process 0; return the metric writers, resuming at `step`."""
    if not setup.peers.first:
        return []
    config = json.dumps(setup.provenance.identity["config"], indent=2)
    (folder / records.CONFIG).write_text(config + "\n")
    run_record.write(folder, setup, trained, total)
    base_record.write(folder, setup.provenance.base_tensors)
    return records.open_writers(setup.config.log, folder, step)


def _newest(checkpoints: Checkpoints) -> str:
    latest = checkpoints.latest()
    return (
        "no checkpoint has been saved"
        if latest is None
        else f"the newest checkpoint is step {latest}, and is finite"
    )


def identity_of(setup: Setup, method: Method, trainable: Tree) -> dict[str, Any]:
    """Return the identity of a run, by which checkpoints are matched to it."""
    return dict(setup.provenance.identity) | {
        "method": method.as_dict(),
        "tree": tree_spec(trainable),
        "steps": setup.steps,
    }


def check_resumable(setup: Setup, method: Method, folder: Path, allowed: Sequence[str]) -> None:
    """Refuse, before any computation, to resume from another run's checkpoints.

    Args:
        setup: prepared run.
        method: method to train.
        folder: folder of the run.
        allowed: fields that may differ.

    Raises:
        ConfigError: the checkpoints belong to another run, or tensors of the base have changed.
        CheckpointError: no checkpoint is valid.
    """
    checkpoints = Checkpoints(folder / "checkpoints", setup.config.checkpoint.keep, setup.peers)
    latest = checkpoints.latest()
    if latest is not None:
        find = partial(base_record.find_changes, folder, setup.provenance.base_tensors)
        base_record.require_same(setup.peers.agree("changed tensors of the base", find), allowed)
        started = method_of(checkpoints.read_meta(latest), method)
        trainable, _ = jax.eval_shape(lambda: rewrite_base(setup, started))
        checkpoints.check_identity(latest, identity_of(setup, method, trainable), allowed)


def _place(setup: Setup, method: Method, params: Mapping[str, Any]) -> tuple[Tree, Tree]:
    """Partition a rewritten tree into `(trainable, frozen)`, each leaf sharded by the rules.

    The trainable leaves are copied, because the train step donates them and the base must stay
    valid.
    """
    where = shardings(setup.mesh, setup.rules, params, method)
    mask = trainable_mask(method, params)
    (trainable, frozen), (of_trainable, of_frozen) = (
        tree.partition(params, mask),
        tree.partition(where, mask),
    )
    copies = jax.tree.map(jnp.copy, put(trainable, of_trainable))
    return put(copies, of_trainable), put(frozen, of_frozen)


def rewrite_base(setup: Setup, method: Method) -> tuple[Tree, Tree]:
    """Inject adapters into the base and partition it, without moving leaves; works abstractly."""
    params = rewrite(method, setup.params, jax.random.key(setup.config.train.seed))
    return tree.partition(params, trainable_mask(method, params))


def _report_experts(method: Method, trainable: Tree, frozen: Tree) -> None:
    """Log how many modules of experts are trained, which neither targets nor shares show."""
    params = tree.combine(trainable, frozen)
    experts = [site for site in find_sites(params) if site.experts]
    if not experts:
        return
    held = dict(paths.walk(trainable))
    whole = sum(len(site.names) for site in experts if (*site.path, "kernel") in held)
    adapted = sum(
        sum(on)
        for part in method.parts()
        for site, on in chosen_sites(part, params).items()
        if site.experts
    )
    count = sum(len(site.names) for site in experts)
    _log.info("%s of %s modules of experts are trained", f"{whole or adapted:,}", f"{count:,}")


def initialize(
    setup: Setup, method: Method, meta: Mapping[str, Any] | None, look: Look | None = None
) -> tuple[Method, Tree, Tree]:
    """Return `(method, trainable, frozen)` after the method's data-dependent initialization.

    The base is rewritten only once, since a new adapter may need a decomposition of every kernel.

    Args:
        setup: prepared run.
        method: method from the config.
        meta: metadata of the checkpoint to resume from, with its method; None for a new run.
        look: called with `(trainable, frozen)` of the new adapter, before initialization from data.
    """
    if meta is not None:
        method = method_of(meta, method)
    key = jax.random.key(setup.config.train.seed)
    fresh = rewrite(method, setup.params, key)
    split = _place(setup, method, fresh)
    if look is not None:
        look(*split)
    if meta is not None:
        return (method, *split)
    run = Start(
        setup.model, setup.params, key, setup.data.tokenizer, partial(_first_batches, setup)
    )
    started, params = training_hooks.start(method, fresh, run)
    return (started, *(split if params is fresh else _place(setup, started, params)))


def method_of(meta: Mapping[str, Any], configured: Method) -> Method:
    """Return the method recorded in a checkpoint.

    Args:
        meta: metadata of the checkpoint.
        configured: method of the config, used if the checkpoint (of an older version) records none.
    """
    return from_dict(meta["method"]) if "method" in meta else configured


def _first_batches(setup: Setup) -> Generator[Mapping[str, Any]]:
    """Yield the training batches from the first; micro-batches one by one."""
    with closing(setup.data.batches.feed({}, setup.steps, lambda: None)) as feed:
        for batch, _ in feed:
            if setup.config.train.accumulation == 1:
                yield batch
            else:
                for i in range(setup.config.train.accumulation):
                    yield {name: value[i] for name, value in batch.items()}


def fixed_leaves(method: Method, frozen: Tree) -> dict[str, jax.Array]:
    """Return the frozen adapter leaves by path, which a checkpoint must save with the trainable
    ones.

    They were initialized from the base, data or a random key; another machine may compute different
    values. Scalars are excluded, since the method's options determine them.
    """
    own = adapter_names(method)
    return {
        paths.text(path): leaf
        for path, leaf in paths.walk(frozen)
        if path[-1] in own and leaf.ndim > len(paths.stacks(path))
    }
