"""Prepare a run from a config: tokenizer, rows, model and loss, independent of the method."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from jax.sharding import Mesh

from jaxpeft import data
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.core.paths import Tree
from jaxpeft.data.batches.stream import Stream
from jaxpeft.data.chat.dialogs import last_answer
from jaxpeft.data.examples.make import CHATS
from jaxpeft.data.pipeline import Splits, make_batches, read_splits
from jaxpeft.errors import ConfigError, nearest
from jaxpeft.evaluation.metrics import figures_of
from jaxpeft.hub import fetching, sources
from jaxpeft.hub.base_identity import architecture, fingerprint, weight_files
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.models.base import Pretrained
from jaxpeft.processes.arrays import check_processes
from jaxpeft.processes.peers import ALONE, Peers
from jaxpeft.sharding.mesh import heads_of, make_mesh
from jaxpeft.sharding.rules import Rules, sharding_rules
from jaxpeft.train import compiling, memory
from jaxpeft.train.artifacts import RunArtifacts, collect_artifacts
from jaxpeft.train.auto import choose_outline
from jaxpeft.train.from_config import training_loss
from jaxpeft.train.losses import Loss, loss_for
from jaxpeft.train.progress import row_progress

_log = logging.getLogger(__name__)
Encoded = data.Encoded


@dataclass(frozen=True)
class RunData:
    """Tokenized rows of a run.

    Attributes:
        train: training rows.
        validation: rows that select the best step.
        test: rows for the final metrics.
        batches: training batches.
        problem: `single_label`, `multi_label`, `regression`, `token` or `lm`.
        labels: class names.
        samples: a few test rows to answer, as `(prompt tokens, reference answer)`.
        tokenizer: tokenizer of the model.
        pad_id: id of the padding token.
    """

    train: Encoded
    validation: Encoded
    test: Encoded
    batches: data.Batches | Stream
    problem: str
    labels: tuple[str, ...]
    samples: tuple[tuple[list[int], str], ...]
    tokenizer: Any
    pad_id: int

    @property
    def judged_by(self) -> str:
        """The split of the final metrics: `test`, or `validation` if there are no test rows."""
        return "validation" if self.test is self.validation else "test"


@dataclass(frozen=True)
class Provenance:
    """Records of a run other than its metrics.

    Attributes:
        identity: identity of the run, saved with checkpoints.
        base_tensors: SHA-256 of each tensor in the base's files.
        decided: artifacts that accompany its adapter.
    """

    identity: Mapping[str, Any]
    base_tensors: Mapping[str, str]
    decided: RunArtifacts


@dataclass(frozen=True)
class Setup:
    """A prepared run.

    Attributes:
        config: config of the run.
        model: Linen module.
        params: base parameters, with a newly initialized head.
        loss: training loss, `(outputs, batch) -> (sum, weight)`.
        plain_loss: loss without label smoothing and z-loss, comparable between runs.
        data: tokenized rows.
        mesh: device mesh.
        rules: sharding rules.
        steps: number of optimizer steps of the run.
        provenance: identity and other records of the run.
        peers: processes of the run.
    """

    config: Config
    model: Pretrained
    params: Tree
    loss: Loss
    plain_loss: Loss
    data: RunData
    mesh: Mesh
    rules: Rules
    steps: int
    provenance: Provenance
    peers: Peers = ALONE


def prepare(config: Config, peers: Peers = ALONE) -> Setup:
    """Read tokenizer, rows and weights.

    Args:
        config: a checked config.
        peers: processes of the run; each reads the rows, and all must read the same.

    Raises:
        JaxpeftError: an input is invalid.
    """
    source = sources.resolve(config.model.path, config.model.revision)
    # check config.json first, since the tokenizer library's error would be less clear
    described = architecture(source)
    mesh, rules = _mesh(config, source), sharding_rules(config.mesh)
    compiling.keep_programs(config.train.compiled)
    splits = read_splits(config, source, partial(row_progress, config.log.progress))
    _check_metric(config.evaluation.metric, splits.problem, splits.examples.label_names)
    base, tensors = _base(source, described, splits, peers)
    batches = make_batches(config, splits)
    steps = config.train.steps or max(
        1, round((config.train.epochs or 0) * (batches.steps_per_epoch or 0))
    )
    outlined = choose_outline(config, splits, batches.lengths[-1], steps, mesh, peers)
    found = memory.layout_of(outlined, mesh, rules)
    params = outlined.read_sharded(found, config.train.seed)
    model = fetching.fetch_kernels(outlined.model, found).clone(
        source=dataclasses.replace(source, sha256=base["sha256"])
    )
    return Setup(
        config=config,
        model=model,
        params=params,
        loss=training_loss(config, splits.train.problem),
        plain_loss=loss_for(config.model.task, splits.train.problem),
        data=_run_data(config, splits, batches),
        mesh=mesh,
        rules=rules,
        steps=steps,
        provenance=Provenance(
            {"config": as_dict(config), "base": base, "data": splits.identity},
            tensors,
            collect_artifacts(config, splits),
        ),
        peers=peers,
    )


def _run_data(config: Config, splits: Splits, batches: data.Batches | Stream) -> RunData:
    return RunData(
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        batches=batches,
        problem=splits.problem,
        labels=splits.examples.label_names,
        samples=_samples(config, splits),
        tokenizer=splits.tokenizer,
        pad_id=splits.pad_id,
    )


def _mesh(config: Config, source: sources.Source) -> Mesh:
    """Make the mesh, and check it against the model's heads, the processes and offloading."""
    mesh = make_mesh(config, heads=heads_of(read_model_config(source.folder)))
    check_processes(mesh)
    fetching.require_host_memory(config.mesh, mesh)
    return mesh


def _base(
    source: sources.Source, described: Mapping[str, Any], splits: Splits, peers: Peers
) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the identity of the base and the SHA-256 of each tensor.

    Raises:
        ConfigError: another process has read other files or rows.
    """
    sha256, tensors = _fingerprint(source, peers)
    base = {"sha256": sha256, "config": described}
    sizes = {file.name: file.stat().st_size for file in weight_files(source)}
    peers.same("base or rows", {"base": base, "files": sizes, "data": splits.identity})
    return base, tensors


def _fingerprint(source: sources.Source, peers: Peers) -> tuple[str, dict[str, str]]:
    """Return the base's fingerprint and the SHA-256 of each tensor; each process hashes a share of
    the files.
    """
    tensors: dict[str, str] = {}

    def share(own: list[str]) -> list[str]:
        found = [
            line for lines in peers.all_gather("hashes of the base's files", own) for line in lines
        ]
        for line in found:
            name, digest = line.rsplit(" ", 1)
            tensors[name] = digest
        return found

    return fingerprint(source, share, slice(peers.process, None, peers.processes)), tensors


def _samples(config: Config, splits: Splits) -> tuple[tuple[list[int], str], ...]:
    rows, examples = min(config.evaluation.samples, len(splits.asked)), splits.asked
    if rows and examples.kind not in CHATS:
        raise ConfigError(
            f"evaluation.samples: rows of {examples.rows.name} have format {examples.kind}, which"
            " has no answers; set it to 0"
        )
    return tuple(
        (splits.encoding.prompt(examples, row), last_answer(examples.texts[row]))
        for row in range(rows)
    )


def _check_metric(metric: str | None, problem: str, labels: Sequence[str]) -> None:
    known = ("loss", *figures_of(problem, labels))
    if metric is not None and metric not in known:
        raise ConfigError(
            f"evaluation.metric: {metric!r} is not a metric of this data{nearest(metric, known)}"
            f" (known: {', '.join(known)})"
        )
