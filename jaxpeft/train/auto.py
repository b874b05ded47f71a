"""What a run's model leaves open, chosen: layers scanned or unrolled, the kernel of attention,
remat; and what does not go together refused.
"""

from __future__ import annotations

import dataclasses
import logging
import math

import jax
import optax
from jax.sharding import Mesh

from jaxpeft.config.schema import Config
from jaxpeft.core import training_hooks, tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.data.pipeline import Splits
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.hub.loading import Outline, outline
from jaxpeft.models.attention import kernel_of, platform
from jaxpeft.processes.peers import Peers
from jaxpeft.remat import REMAT_POLICIES
from jaxpeft.sharding.layout import require_used, shardings
from jaxpeft.sharding.rules import sharding_rules
from jaxpeft.sharding.sizes import SEQUENCE, row_shards
from jaxpeft.train import memory
from jaxpeft.train.from_config import abstract_rewrite, model_request
from jaxpeft.train.optimizers import schedule

_log = logging.getLogger(__name__)
_MANY_LAYERS, _FEW_STEPS = 12, 200
"""Of more layers and fewer steps than these, unrolled layers take longer to compile than they save.
"""


def choose_outline(
    config: Config, splits: Splits, length: int, steps: int, mesh: Mesh, peers: Peers
) -> Outline:
    """Return the outline of a run's model, checked, with all chosen that the config leaves open.

    Args:
        config: the options.
        splits: the rows.
        length: tokens of the longest row.
        steps: of the run.
        mesh: the devices.
        peers: the processes of the run.

    Raises:
        ConfigError: naming what the model, its sites or the length of the run do not allow.
    """
    outlined = _choose_layers(config, splits, steps, length, mesh)
    trained = _check(config, outlined, length, steps, mesh)
    # what is computed again must be the same everywhere, so one device speaks for all
    budget = peers.agree(
        "memory of a device",
        lambda: memory.budget_of(mesh.local_devices[0], config.model.memory_gb),
    )
    return _with_remat(config, outlined, trained, length, mesh, budget)


def _choose_layers(config: Config, splits: Splits, steps: int, length: int, mesh: Mesh) -> Outline:
    """Outline the model, with its layers scanned or unrolled as the config says or as suits the
    length of the run.
    """
    attention = kernel_of(
        config.model.attention, platform(mesh.devices.flat[0]), mesh.shape[SEQUENCE]
    )
    found = _outline(config, splits, bool(config.model.scan_layers), attention)
    few = found.model.config.num_hidden_layers <= _MANY_LAYERS or steps >= _FEW_STEPS
    # which XLA copies out of a stack
    codes = config.model.quant != "none" and platform(mesh.devices.flat[0]) == "cuda"
    if config.model.scan_layers is not None or few or codes:
        return found
    scanned = _outline(config, splits, True, attention)
    try:
        _check(config, scanned, length, steps, mesh)
    except (TargetError, ConfigError):  # layers that differ cannot be stacked
        return found
    return scanned


def _outline(config: Config, splits: Splits, scan_layers: bool, attention: str) -> Outline:
    labels = splits.examples.num_labels or None
    request = model_request(config.model, labels, scan_layers=scan_layers, attention=attention)
    return outline(config.model.path, request, config.model.revision)


def _with_remat(
    config: Config, outlined: Outline, trained: int, length: int, mesh: Mesh, budget: float | None
) -> Outline:
    """Choose what the backward pass computes again, where the config leaves it open; warns of a
    step that may not fit a known memory.
    """
    if budget is None:
        return outlined
    rows = config.train.batch_size // (config.train.accumulation * row_shards(mesh.shape))
    where = memory.layout_of(outlined, mesh, sharding_rules(config.mesh))
    needs = memory.estimate(outlined, trained, max(1, rows), length // mesh.shape[SEQUENCE], where)
    remat = needs.fastest(budget) if config.model.remat == "auto" else config.model.remat
    if not REMAT_POLICIES[remat].estimated:
        return outlined
    _log.info(
        "remat %s: %.1f GB estimated of %.1f GB", remat, needs.total(remat) / 1e9, budget / 1e9
    )
    if needs.total(remat) > budget:
        largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.largest(remat))
        _log.warning(
            "a step may not fit: %.1f GB estimated of %.1f GB (%s); lower train.batch_size or"
            " data.max_length, raise train.accumulation, or set model.quant or mesh.strategy",
            needs.total(remat) / 1e9,
            budget / 1e9,
            largest,
        )
    return dataclasses.replace(
        outlined,
        model=outlined.model.clone(
            options=dataclasses.replace(outlined.model.options, remat=remat)
        ),
    )


def _check(config: Config, outlined: Outline, length: int, steps: int, mesh: Mesh) -> int:
    """Refuse, before weights are read, what the model, its sites or the length of the run do not
    allow.

    Returns:
        How many trained parameters a device holds.
    """
    method, rules = config.method, sharding_rules(config.mesh)
    most = getattr(outlined.model.config, "max_position_embeddings", None)
    virtual = training_hooks.virtual_positions(method)
    if most is not None and length + virtual > most:
        behind = f" behind {virtual} virtual ones" if virtual else ""
        raise ConfigError(
            f"data.max_length: rows of {length} tokens{behind}, the model has {most} positions; set"
            f" it to {most - virtual} or less"
        )
    schedule(config.optimizer, config.optimizer.learning_rate, steps)
    params = abstract_rewrite(method, outlined.abstract)
    mask = trainable_mask(method, params)
    own = (
        tree.partition(params, mask)[0],
        tree.partition(shardings(mesh, rules, params, method), mask)[0],
    )
    held = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), *own)
    training_hooks.wrap_optimizer(
        method, optax.identity(), steps
    )  # which refuses a schedule that does not fit the run
    if not config.compare.candidates:  # whose rules may be those of another
        require_used(rules, outlined.leaves, params)
    return sum(jax.tree.leaves(held))
