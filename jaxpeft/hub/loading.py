"""Loading a pretrained model: `load`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxpeft import logs, models
from jaxpeft.choices import Task
from jaxpeft.core import paths, tree
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.hub import fetching, merge_record, sources
from jaxpeft.hub.checkpoints import Checkpoint, SafetensorsCheckpoint
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.weights import leaf_tensors, quantized_cache, shards
from jaxpeft.hub.weights.safetensors_files import Meter
from jaxpeft.json_files import read_json
from jaxpeft.models.base import ModelOptions, Pretrained, abstract_params
from jaxpeft.quant.quantize import Quant
from jaxpeft.sharding.layout import Layout, by_path, layout, log_dropped
from jaxpeft.sharding.rules import Rules, strategy_rules

_log = logging.getLogger(__name__)


def load(
    path_or_hub_id: str | FilePath,
    *,
    task: Task,
    num_labels: int | None = None,
    dtype: Any = None,
    compute_dtype: Any = None,
    scan_layers: bool = False,
    pooling: str | None = None,
    remat: str = "none",
    attention: str = "auto",
    revision: str | None = None,
    vocab_size: int | None = None,
    quant: Quant | str | None = None,
    seed: int = 0,
    sharding: shards.Places | None = None,
    mesh: Mesh | None = None,
    rules: Rules | None = None,
    cache: bool = True,
) -> tuple[Pretrained, Tree]:
    """Load a pretrained model: a Linen module and its parameters.

    Args:
        path_or_hub_id: a folder with `config.json` and safetensors weights, a hub id, or
            `package:NAME`.
        task: which head; `encoder` gives hidden states.
        num_labels: of a classification head; None takes it from the labels in `config.json`.
        dtype: of the base's leaves; None keeps the file's. A newly made head is float32.
        compute_dtype: of the activations; None takes `dtype`, or the file's.
        scan_layers: whether the layers are stacked and scanned (faster to compile) or unrolled
            (faster to run).
        pooling: what a sequence classifier reads: `pooler`, `cls`, `mean`, `last`; None takes the
            architecture's own.
        remat: what the backward pass computes again: `none`, `products`, `attention`, `full`,
            `offload`.
        attention: the kernel that computes attention where it fits: `xla`, `cudnn`, `splash`;
            `auto` takes the fastest of the platform.
        revision: of a hub id: branch, tag or commit.
        vocab_size: of the embedding and the language-model head, where tokens were added to the
            tokenizer; the new rows begin as the mean of the others. None keeps the model's.
        quant: `nf4`, `int4`, `int8`, `fp8`, or a `jaxpeft.Quant` that says which kernels: they are
            quantized as they are read, one layer after the other, so that the model never exists as
            a whole in more bits. Embeddings and heads stay as they are. A checkpoint that
            `bitsandbytes` has quantized to NF4 is read as it is, with None or `nf4`.
        seed: for the leaves of a newly made head.
        sharding: a `jax.sharding.Sharding` for all leaves, or a function that gives that of each
            leaf by its path, as it is stored (a quantized kernel as the leaves that hold it); None
            for the first device. A process reads the parts of the files that its own devices hold,
            and the numbers are the same on any of them.
        mesh: the devices to shard the parameters over (`create_device_mesh`), in place of
            `sharding`; the model then gathers what its layers need.
        rules: which axes of the mesh each leaf lies along (`sharding_rules`); None replicates every
            leaf.
        cache: whether quantized kernels of more than a gigabyte are kept on disk, and read from
            there the next time; the environment's `JAXPEFT_CACHE` says where, or `off`. Several
            processes keep none.

    Returns:
        `(model, params)`; `model` records where it came from in `model.source`.

    Raises:
        WeightsError: files are missing, are not safetensors, or do not fit the model; all problems
            at once.
        ConfigError: the architecture, one of its switches, or the task is not supported.
    """
    request = ModelRequest(
        task,
        num_labels,
        dtype,
        compute_dtype,
        scan_layers,
        pooling,
        remat,
        attention,
        vocab_size,
        Quant(quant) if isinstance(quant, str) else quant,
    )
    if mesh is None and rules is not None:
        raise ConfigError("rules: say nothing without a mesh; give load(mesh=...) as well")
    if mesh is not None and sharding is not None:
        raise ConfigError(
            "sharding: the mesh and its rules say where each leaf lies; give one of sharding and"
            " mesh"
        )
    outlined = outline(path_or_hub_id, request, revision)
    if mesh is None:
        return outlined.model, outlined.read(seed, sharding, cache=cache)
    rules = rules or Rules(strategy_rules(None))
    fetching.require_host_memory(rules, mesh)
    found = layout(mesh, rules, outlined.leaves)
    return fetching.fetch_kernels(outlined.model, found), outlined.read_sharded(
        found, seed, cache=cache
    )


@dataclass(frozen=True)
class Outline:
    """A pretrained model of which everything is known but the numbers.

    Attributes:
        model: the Linen module.
        abstract: shape and dtype of every leaf, as the module has them.
        stored: the same as the checkpoint has them: they differ where tokens are added.
        config: the content of `config.json`.
        plan: where each leaf is to be read from.
        quant: which kernels are quantized as they are read, and how; None for none.
        meter: how many bytes of the checkpoint's tensors were read.
    """

    model: Pretrained
    abstract: Tree
    stored: Tree
    config: Mapping[str, Any]
    plan: leaf_tensors.WeightPlan
    quant: Quant | None = None
    meter: Meter = field(default_factory=Meter, compare=False)

    def read(
        self, seed: int = 0, sharding: shards.Places | None = None, *, cache: bool = True
    ) -> Tree:
        """Read the numbers, slice by slice: see `load`.

        Raises:
            ConfigError: a sharding does not fit its leaf.
            WeightsError: a file cannot be read.
        """
        started = time.perf_counter()
        logs.show()
        _log.info("loading %s ...", self.model.source.name if self.model.source else "the model")
        if self.model.source:
            merge_record.require_undamaged(self.model.source.folder)
        new = _new_leaves(self.model, self.plan.new, seed)
        place = self._cache_entry() if cache else None
        cached = place.open() if place else None
        params = shards.read(self.abstract, cached or self.plan, new, sharding, self.quant)
        if place and not cached:
            place.write(params)
        _report(self, params, time.perf_counter() - started)
        return params

    def read_sharded(self, found: Layout, seed: int = 0, *, cache: bool = True) -> Tree:
        """Read the numbers, each leaf to where it lies: see `load`.

        Args:
            found: where the leaves lie, as they are stored.
            seed: for the leaves of a newly made head.
            cache: as of `load`.
        """
        log_dropped(found)
        return self.read(seed, by_path(found.shardings), cache=cache)

    @property
    def leaves(self) -> Tree:
        """Shape and dtype of every leaf as `read` gives it: a quantized kernel as the leaves that
        hold it.
        """
        return shards.leaves(self.abstract, self.plan, self.quant)

    def _cache_entry(self) -> quantized_cache.Entry | None:
        """Return the place of the quantized kernels on disk; None where there are none, or the
        files have them.
        """
        if self.quant is None or self.plan.held:
            return None
        return quantized_cache.entry(self.plan, self.quant, self.quant.sites(self.abstract))


def outline(
    path_or_hub_id: str | FilePath, request: ModelRequest, revision: str | None = None
) -> Outline:
    """Find out everything about a pretrained model but its numbers: what can be refused is, before
    any is read.

    Args:
        path_or_hub_id: as of `load`.
        request: what is asked of it.
        revision: of a hub id.

    Raises:
        WeightsError: files are missing, are not safetensors, or do not fit the model; all problems
            at once.
        ConfigError: the architecture, one of its switches, or the task is not supported.
    """
    logs.show()
    source = sources.resolve(path_or_hub_id, revision)
    return outline_of(
        request, SafetensorsCheckpoint.open(source, read_json(source.folder / "config.json"))
    )


def outline_of(request: ModelRequest, checkpoint: Checkpoint) -> Outline:
    """Return the outline that a request makes of a checkpoint: of its tensors, or of its
    `config.json` alone.

    Raises:
        WeightsError: the tensors do not fit the model.
        ConfigError: something that is asked for is not supported, or does not go with the
            checkpoint.
    """
    config = checkpoint.config
    model = models.build(config, _options(request, checkpoint), checkpoint.where).clone(
        source=checkpoint.source
    )
    family = models.FAMILIES[config["model_type"]]
    checkpoint.require_sizes(model, family)
    own = model.config.vocab_size
    if request.vocab_size is not None and request.vocab_size < own:
        raise ConfigError(
            f"vocab_size: {request.vocab_size} is less than the model's {own} tokens; tokens can be"
            " added, not removed"
        )
    abstract = abstract_params(model)
    plan = checkpoint.plan(model, abstract, family, request)
    quant = checkpoint.quant(abstract, plan, request.quant)
    model = model.clone(options=dataclasses.replace(model.options, quant=quant))
    found = Outline(model, abstract, abstract, config, plan, quant, checkpoint.meter)
    sites = (
        quant.sites(abstract) if quant else {}
    )  # what does not fit is told before anything is read
    return found if request.vocab_size in (None, own) else _grow(found, request.vocab_size, sites)


def _options(request: ModelRequest, checkpoint: Checkpoint) -> ModelOptions:
    """Return how the model is used, with what the request leaves open taken from the checkpoint."""
    labels = request.num_labels
    return ModelOptions(
        task=request.task,
        num_labels=labels if labels is not None else _labels_of(checkpoint.config, request.task),
        dtype=request.compute_dtype or request.dtype or checkpoint.dtype,
        scan_layers=request.scan_layers,
        pooling=request.pooling or _pooling(request.task, checkpoint),
        remat=request.remat,
        attention=request.kernel,
        right_padded=request.right_padded,
        quant=request.quant,
    )


def _grow(outlined: Outline, vocab_size: int, quantized: Mapping[Path, Site]) -> Outline:
    """Return the outline of the model with more tokens.

    Raises:
        ConfigError: a kernel that is to be quantized would get more of them.
    """
    model, own = outlined.model, outlined.abstract
    grown = model.clone(config=dataclasses.replace(model.config, vocab_size=vocab_size))
    wanted = paths.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, paths.get(own, path).dtype),
        abstract_params(grown),
    )
    for path, leaf in paths.walk(wanted):
        if path in quantized and leaf.shape != paths.get(own, path).shape:
            raise ConfigError(
                f"quant: {quantized[path].name} is to be quantized, and vocab_size={vocab_size}"
                " gives it more tokens; exclude it"
            )
    return dataclasses.replace(
        outlined, model=grown, abstract=wanted, plan=outlined.plan.grown(wanted)
    )


def _labels_of(config: Mapping[str, Any], task: str) -> int | None:
    """Return the number of labels that `config.json` names, or transformers' default, 2."""
    if task in ("causal_lm", "encoder"):
        return None
    named: Any = config.get("id2label")
    return len(named) if isinstance(named, dict) and named else config.get("num_labels", 2)


def _pooling(task: str, checkpoint: Checkpoint) -> str | None:
    """Return mean pooling for a checkpoint that lacks the pooler of its architecture: a random one
    is nobody's wish.
    """
    family = models.FAMILIES.get(str(checkpoint.config.get("model_type")))
    needed = family.own_pooler if family and task == "sequence_classification" else None
    if needed is None or checkpoint.holds(needed):
        return None
    _log.warning(
        "the checkpoint has no pooler (%s); the classifier reads the mean over tokens", needed
    )
    return "mean"


def _new_leaves(
    model: Pretrained, wanted: tuple[Path, ...], seed: int
) -> dict[Path, np.ndarray[Any, Any]]:
    """Make the leaves of a new head whole, on one device of each process: the numbers do not depend
    on how they are spread.
    """
    if not wanted:
        return {}
    ids = np.zeros((1, 2), np.int32)

    @jax.jit
    def make(rng: jax.Array) -> list[jax.Array]:
        made = model.init(rng, ids)["params"]
        return [paths.get(made, path).astype(jnp.float32) for path in wanted]

    made = make(jax.random.key(seed))
    return {path: np.asarray(leaf) for path, leaf in zip(wanted, made, strict=True)}


def _report(loaded: Outline, params: Tree, seconds: float) -> None:
    size = sum(leaf.nbytes for _, leaf in paths.walk(params))
    dtypes = "/".join(sorted({str(leaf.dtype) for _, leaf in paths.walk(params)}))
    source, plan = loaded.model.source, loaded.plan
    name = (
        ""
        if source is None
        else source.name + (f" at {source.revision}" if source.revision else "")
    )
    _log.info(
        "loaded %s (%s): %.1f M parameters, %.1f MB as %s, in %.1f s",
        name,
        loaded.config["model_type"],
        tree.count(params) / 1e6,
        size / 1e6,
        dtypes,
        seconds,
    )
    if jax.process_count() > 1:
        held = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves(params)
            for shard in leaf.addressable_shards
        )
        _log.info(
            "this process read %.1f MB, its devices hold %.1f MB",
            loaded.meter.bytes / 1e6,
            held / 1e6,
        )
    if plan.new:
        _log.info(
            "newly made head: %s", ", ".join(sorted({paths.text(path[:-1]) for path in plan.new}))
        )
    if plan.replaced:
        _log.warning(
            "the checkpoint's head is for another number of labels and was made newly: %s",
            ", ".join(plan.replaced),
        )
