"""Choose the model options that a config leaves open (scanned or unrolled layers, attention kernel,
remat), and reject incompatible ones.
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
"""With more layers and fewer steps than these, unrolled layers cost more compile time than they
save.
"""


def choose_outline(
    config: Config, splits: Splits, length: int, steps: int, mesh: Mesh, peers: Peers
) -> Outline:
    """Return the checked outline of a run's model, with every open option chosen.

    Args:
        config: config of the run.
        splits: rows of the run.
        length: number of tokens of the longest row.
        steps: number of steps of the run.
        mesh: device mesh.
        peers: processes of the run.

    Raises:
        ConfigError: the model, its sites or the number of steps do not allow the config.
    """
    outlined = _choose_layers(config, splits, steps, length, mesh)
    trained = _check(config, outlined, length, steps, mesh)
    # all processes must choose the same remat policy, so one device's memory decides
    budget = peers.agree(
        "memory of a device",
        lambda: memory.budget_of(mesh.local_devices[0], config.model.memory_gb),
    )
    return _with_remat(config, outlined, trained, length, mesh, budget)


def _choose_layers(config: Config, splits: Splits, steps: int, length: int, mesh: Mesh) -> Outline:
    """Outline the model; unless the config decides, the number of steps decides whether layers are
    scanned or unrolled.
    """
    attention = kernel_of(
        config.model.attention, platform(mesh.devices.flat[0]), mesh.shape[SEQUENCE]
    )
    found = _outline(config, splits, bool(config.model.scan_layers), attention)
    few = found.model.config.num_hidden_layers <= _MANY_LAYERS or steps >= _FEW_STEPS
    # XLA would copy quantized kernels out of a stack
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
    """Choose the remat policy if the config leaves it open; warn if a step may not fit."""
    if budget is None:
        return outlined
    rows = config.train.batch_size // (config.train.accumulation * row_shards(mesh.shape))
    where = memory.layout_of(outlined, mesh, sharding_rules(config.mesh))
    needs = memory.estimate(outlined, trained, max(1, rows), length // mesh.shape[SEQUENCE], where)
    remat = needs.fastest(budget) if config.model.remat == "auto" else config.model.remat
    if not REMAT_POLICIES[remat].estimated:
        return outlined
    _log.info(
        "remat %s: estimated %.1f GB of %.1f GB", remat, needs.total(remat) / 1e9, budget / 1e9
    )
    if needs.total(remat) > budget:
        largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.largest(remat))
        _log.warning(
            "a step may not fit in memory: estimated %.1f GB of %.1f GB (%s); lower"
            " train.batch_size or data.max_length, raise train.accumulation, or set model.quant or"
            " mesh.strategy",
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
    """Reject, before weights are read, what the model, its sites or the number of steps do not
    allow.

    Returns:
        Number of trainable parameters per device.
    """
    method, rules = config.method, sharding_rules(config.mesh)
    most = getattr(outlined.model.config, "max_position_embeddings", None)
    virtual = training_hooks.virtual_positions(method)
    if most is not None and length + virtual > most:
        added = f" and {virtual} virtual ones" if virtual else ""
        raise ConfigError(
            f"data.max_length: rows have {length} tokens{added}, but the model has {most}"
            f" positions; set it to {most - virtual} or less"
        )
    schedule(config.optimizer, config.optimizer.learning_rate, steps)
    params = abstract_rewrite(method, outlined.abstract)
    mask = trainable_mask(method, params)
    own = (
        tree.partition(params, mask)[0],
        tree.partition(shardings(mesh, rules, params, method), mask)[0],
    )
    held = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), *own)
    # rejects a schedule that does not fit the run
    training_hooks.wrap_optimizer(method, optax.identity(), steps)
    if not config.compare.candidates:  # a rule may apply to another candidate
        require_used(rules, outlined.leaves, params)
    return sum(jax.tree.leaves(held))
