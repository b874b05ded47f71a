"""From a config to what a run needs: tokenizer, rows, model, loss. What is the same for every method."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax
from jax.sharding import Mesh

from jaxpeft import data
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.core import training_hooks, tree
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.data.dialogs import last_answer
from jaxpeft.data.examples import CHATS
from jaxpeft.data.pipeline import Splits, make_batches, read_splits
from jaxpeft.data.stream import Stream
from jaxpeft.errors import ConfigError, TargetError, nearest
from jaxpeft.evaluation.metrics import figures_of
from jaxpeft.hub import placing, sources
from jaxpeft.hub.base_identity import architecture, fingerprint, weight_files
from jaxpeft.hub.loading import Outline, outline
from jaxpeft.json_files import read_json
from jaxpeft.models.attention import kernel_of, platform
from jaxpeft.models.base import Pretrained
from jaxpeft.peers import ALONE, Peers
from jaxpeft.remat import REMAT_POLICIES
from jaxpeft.sharding.mesh import heads_of, make_mesh
from jaxpeft.sharding.processes import check_processes
from jaxpeft.sharding.rules import Rules, sharding_rules
from jaxpeft.sharding.sizes import SEQUENCE, row_shards
from jaxpeft.sharding.specs import require_used, shardings
from jaxpeft.training import compiling, memory
from jaxpeft.training.decided import Decided, decide
from jaxpeft.training.from_config import abstract_rewrite, model_request, training_loss
from jaxpeft.training.losses import Loss, loss_for
from jaxpeft.training.optimizers import schedule
from jaxpeft.training.progress import rows_shown

_log = logging.getLogger(__name__)
Encoded = data.Encoded


@dataclass(frozen=True)
class Setup:
    """A prepared run.

    Attributes:
        config: its options.
        model: the Linen module.
        params: the base, with a newly made head.
        loss: from logits and batch to sum and weight.
        plain_loss: the same without label smoothing and z-loss, for figures that compare.
        train: the training rows as tokens.
        validation: the rows to choose the best step by.
        test: the rows for the final figures.
        batches: the training batches.
        mesh: the devices.
        rules: which axes of the mesh each leaf lies along.
        steps: optimizer steps of the whole run.
        pad_id: token to pad with.
        labels: names of the classes.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        samples: a few test rows to answer: the prompt's tokens, and the answer as it is in the rows.
        tokenizer: of the model.
        identity: what makes this run this run, for the checkpoints.
        base_tensors: the SHA-256 of each tensor of the base's files.
        decided: what goes with its adapter.
        peers: the processes of the run.
    """

    config: Config
    model: Pretrained
    params: Tree
    loss: Loss
    plain_loss: Loss
    train: Encoded
    validation: Encoded
    test: Encoded
    batches: data.Batches | Stream
    mesh: Mesh
    rules: Rules
    steps: int
    pad_id: int
    labels: tuple[str, ...]
    problem: str
    samples: tuple[tuple[list[int], str], ...]
    tokenizer: Any
    identity: Mapping[str, Any]
    base_tensors: Mapping[str, str]
    decided: Decided
    peers: Peers = ALONE

    @property
    def judged_by(self) -> str:
        """The split of the final figures: `test`, or `validation` where there are no test rows."""
        return "validation" if self.test is self.validation else "test"


def prepare(config: Config, peers: Peers = ALONE) -> Setup:
    """Read tokenizer, rows and weights.

    Args:
        config: a checked config.
        peers: the processes of the run; each reads the rows, and all must have read the same.

    Raises:
        JaxpeftError: whatever cannot be used, named.
    """
    source = sources.resolve(config.model.path, config.model.revision)
    described = architecture(
        source
    )  # else the tokenizer's library refuses the same config.json, with an error of its own
    mesh, rules = _mesh(config, source), sharding_rules(config.mesh)
    compiling.keep_programs(config.train.compiled)
    splits = read_splits(config, source, partial(rows_shown, config.log.progress))
    _check_metric(config.evaluation.metric, splits.problem, splits.examples.label_names)
    base, tensors = _base(source, described, splits, peers)
    batches = make_batches(config, splits)
    steps = config.train.steps or max(1, round((config.train.epochs or 0) * (batches.steps_per_epoch or 0)))
    outlined = _chosen(config, splits, batches.lengths[-1], steps, mesh, peers)
    found = memory.layout_of(outlined, mesh, rules)
    params = outlined.read_sharded(found, config.train.seed)
    model = placing.bringing(outlined.model, found).clone(source=dataclasses.replace(source, sha256=base["sha256"]))
    return Setup(
        config=config,
        model=model,
        params=params,
        loss=training_loss(config, splits.train.problem),
        plain_loss=loss_for(config.model.task, splits.train.problem),
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        batches=batches,
        mesh=mesh,
        rules=rules,
        steps=steps,
        pad_id=splits.pad_id,
        labels=splits.examples.label_names,
        problem=splits.problem,
        samples=_samples(config, splits),
        tokenizer=splits.tokenizer,
        identity={"config": as_dict(config), "base": base, "data": splits.identity},
        base_tensors=tensors,
        decided=decide(config, splits),
        peers=peers,
    )


def _mesh(config: Config, source: sources.Source) -> Mesh:
    """Return the devices of a run, which must go with its model's heads, its processes and what it offloads."""
    mesh = make_mesh(config, heads=heads_of(read_json(source.folder / "config.json")))
    check_processes(mesh)
    placing.check(config.mesh, mesh)
    return mesh


def _base(
    source: sources.Source, described: Mapping[str, Any], splits: Splits, peers: Peers
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return what makes the base this base, and the SHA-256 of each of its tensors; refuse other files or rows of another process."""
    sha256, tensors = _fingerprint(source, peers)
    base = {"sha256": sha256, "config": described}
    sizes = {file.name: file.stat().st_size for file in weight_files(source)}
    peers.same("base or rows", {"base": base, "files": sizes, "data": splits.identity})
    return base, tensors


def _fingerprint(source: sources.Source, peers: Peers) -> tuple[str, dict[str, str]]:
    """Return the base's fingerprint, and the SHA-256 of each tensor; of several processes each hashes some of the files."""
    tensors: dict[str, str] = {}

    def share(own: list[str]) -> list[str]:
        found = [line for lines in peers.gathered("hashes of the base's files", own) for line in lines]
        for line in found:
            name, digest = line.rsplit(" ", 1)
            tensors[name] = digest
        return found

    return fingerprint(source, share, slice(peers.process, None, peers.processes)), tensors


def _samples(config: Config, splits: Splits) -> tuple[tuple[list[int], str], ...]:
    rows, asked = min(config.evaluation.samples, len(splits.asked)), splits.asked
    if rows and asked.kind not in CHATS:
        raise ConfigError(
            f"evaluation.samples: {asked.rows.name} holds rows of format {asked.kind}, which have no answers; set it to 0"
        )
    return tuple((splits.encoding.prompt(asked, row), last_answer(asked.texts[row])) for row in range(rows))


_MANY_LAYERS, _FEW_STEPS = 12, 200
"""Of more layers and fewer steps than these, unrolled layers take longer to compile than they save."""


def _chosen(config: Config, splits: Splits, length: int, steps: int, mesh: Mesh, peers: Peers) -> Outline:
    """Return the outline of the model, checked, with all chosen that the config leaves open."""
    outlined = _outlined(config, splits, steps, length, mesh)
    trained = _check(config, outlined, length, steps, mesh)
    # what is computed again must be the same everywhere, so one device speaks for all
    budget = peers.agreed("memory of a device", lambda: memory.budget_of(mesh.local_devices[0], config.model.memory_gb))
    return _with_remat(config, outlined, trained, length, mesh, budget)


def _outlined(config: Config, splits: Splits, steps: int, length: int, mesh: Mesh) -> Outline:
    """Outline the model, with its layers scanned or unrolled as the config says or as suits the length of the run."""
    attention = kernel_of(config.model.attention, platform(mesh.devices.flat[0]), mesh.shape[SEQUENCE])
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
    """Choose what the backward pass computes again, where the config leaves it open; warns of a step that may not fit a known memory."""
    if budget is None:
        return outlined
    rows = config.train.batch_size // (config.train.accumulation * row_shards(mesh.shape))
    where = memory.layout_of(outlined, mesh, sharding_rules(config.mesh))
    needs = memory.estimate(outlined, trained, max(1, rows), length // mesh.shape[SEQUENCE], where)
    remat = needs.fastest(budget) if config.model.remat == "auto" else config.model.remat
    if not REMAT_POLICIES[remat].estimated:
        return outlined
    _log.info("remat %s: %.1f GB estimated of %.1f GB", remat, needs.total(remat) / 1e9, budget / 1e9)
    if needs.total(remat) > budget:
        largest = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in needs.largest(remat))
        _log.warning(
            "a step may not fit: %.1f GB estimated of %.1f GB (%s); lower train.batch_size or data.max_length, raise train.accumulation, "
            "or set model.quant or mesh.strategy", needs.total(remat) / 1e9, budget / 1e9, largest,
        )  # fmt: skip
    return dataclasses.replace(
        outlined, model=outlined.model.clone(options=dataclasses.replace(outlined.model.options, remat=remat))
    )


def _check(config: Config, outlined: Outline, length: int, steps: int, mesh: Mesh) -> int:
    """Refuse, before weights are read, what the model, its sites or the length of the run do not allow.

    Returns:
        How many trained parameters a device holds.
    """
    method, rules = config.method, sharding_rules(config.mesh)
    most = getattr(outlined.model.config, "max_position_embeddings", None)
    virtual = training_hooks.virtual_positions(method)
    if most is not None and length + virtual > most:
        behind = f" behind {virtual} virtual ones" if virtual else ""
        raise ConfigError(
            f"data.max_length: rows of {length} tokens{behind}, the model has {most} positions; set it to {most - virtual} or less"
        )
    schedule(config.optimizer, config.optimizer.learning_rate, steps)
    params = abstract_rewrite(method, outlined.abstract)
    mask = trainable_mask(method, params)
    own = tree.partition(params, mask)[0], tree.partition(shardings(mesh, rules, params, method), mask)[0]
    held = jax.tree.map(lambda leaf, where: math.prod(where.shard_shape(leaf.shape)), *own)
    training_hooks.wrap_optimizer(method, optax.identity(), steps)  # which refuses a schedule that does not fit the run
    if not config.compare.candidates:  # whose rules may be those of another
        require_used(rules, outlined.leaves, params)
    return sum(jax.tree.leaves(held))


def _check_metric(metric: str | None, problem: str, labels: Sequence[str]) -> None:
    known = ("loss", *figures_of(problem, labels))
    if metric is not None and metric not in known:
        raise ConfigError(
            f"evaluation.metric: {metric!r} is not a figure of this data{nearest(metric, known)} (known: {', '.join(known)})"
        )
