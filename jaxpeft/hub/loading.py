"""Loading a pretrained model: `load`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
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
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.hub.weights import leaf_tensors, quantized_cache, shards
from jaxpeft.hub.weights.safetensors_files import Meter
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
        task: the task, which selects the head; `encoder` returns hidden states.
        num_labels: number of labels of a classification head; None takes it from `config.json`.
        dtype: dtype of the base's leaves; None keeps the checkpoint's. A new head is float32.
        compute_dtype: dtype of the activations; None uses `dtype`, or the checkpoint's.
        scan_layers: whether the layers are stacked and scanned (faster to compile) or unrolled
            (faster to run).
        pooling: the sequence classifier's input: `pooler`, `cls`, `mean`, `last`; None uses the
            architecture's own.
        remat: what the backward pass recomputes: `none`, `products`, `attention`, `full`,
            `offload`.
        attention: the attention kernel, used where it is applicable: `xla`, `chunked`, `cudnn`,
            `splash`; `auto` selects the fastest one of the platform.
        revision: branch, tag or commit of a hub id.
        vocab_size: number of tokens of the embedding and the language-model head, if tokens were
            added to the tokenizer; the new rows are initialized to the mean of the existing ones.
            None keeps the model's.
        quant: `nf4`, `int4`, `int8`, `fp8`, `mxfp4`, or a `jaxpeft.Quant` that selects kernels.
            They are quantized layer by layer while they are read, so that the unquantized model is
            never in memory. Embeddings and heads are not quantized. A checkpoint quantized to NF4
            by `bitsandbytes`, or whose experts are in MXFP4, is read as it is, with None or the
            name of its format.
        seed: seed of a new head.
        sharding: a `jax.sharding.Sharding` for all leaves, or a function from the path of a stored
            leaf (a quantized kernel is stored as several) to its sharding; None for the first
            device of this process. Each process reads only its own devices' parts of the files, and
            the values do not depend on the sharding.
        mesh: device mesh to shard the parameters over (`create_device_mesh`), instead of
            `sharding`; the model then gathers what its layers need.
        rules: mesh axes that shard each leaf (`sharding_rules`); None replicates every leaf.
        cache: whether quantized kernels of more than a gigabyte are cached on disk for the next
            load, in the directory `JAXPEFT_CACHE` (`off` disables it). Not used with several
            processes.

    Returns:
        `(model, params)`; `model.source` records where the model came from.

    Raises:
        WeightsError: Files are missing, are not safetensors, or do not fit the model; it lists all
            problems.
        ConfigError: The architecture, one of its switches, or the task is not supported.
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
        raise ConfigError("rules: have no effect without a mesh; pass load(mesh=...) as well")
    if mesh is not None and sharding is not None:
        raise ConfigError(
            "sharding: the mesh and its rules already shard each leaf; pass either sharding or mesh"
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
    """Everything about a pretrained model except its parameter values.

    Attributes:
        model: the Linen module.
        abstract: shape and dtype of every leaf in the module.
        config: the content of `config.json`.
        plan: where each leaf is read from.
        quant: which kernels are quantized while they are read, and how; None for no quantization.
        meter: counts the bytes read from the checkpoint's tensors.
    """

    model: Pretrained
    abstract: Tree
    config: Mapping[str, Any]
    plan: leaf_tensors.WeightPlan
    quant: Quant | None = None
    meter: Meter = field(default_factory=Meter, compare=False)

    def read(
        self,
        seed: int = 0,
        sharding: shards.Places | None = None,
        *,
        cache: bool = True,
        log_head: bool = True,
    ) -> Tree:
        """Read the parameters, slice by slice.

        Args:
            seed: see `load`.
            sharding: see `load`.
            cache: see `load`.
            log_head: whether to log that a head is new; if not, an adapter may still replace it,
                and `log_new_head` follows.

        Raises:
            ConfigError: A sharding does not fit its leaf.
            WeightsError: A file cannot be read.
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
        if log_head:
            _log_head(self.plan.new, self.plan.replaced)
        return params

    def read_sharded(
        self, found: Layout, seed: int = 0, *, cache: bool = True, log_head: bool = True
    ) -> Tree:
        """Read the parameters into their shards.

        Args:
            found: layout of the stored leaves.
            seed: seed of a new head.
            cache: see `load`.
            log_head: see `read`.
        """
        log_dropped(found)
        return self.read(seed, by_path(found.shardings), cache=cache, log_head=log_head)

    def log_new_head(self, base: Tree, adapted: Tree) -> None:
        """Log the new leaves of the head that an adapter has not replaced.

        Args:
            base: the parameters as read.
            adapted: those with the adapter.
        """
        new = [
            path
            for path in self.plan.new
            if jnp.array_equal(paths.get(base, path), paths.get(adapted, path))
        ]
        _log_head(new, self.plan.replaced if new else ())

    @property
    def leaves(self) -> Tree:
        """Shape and dtype of every leaf that `read` returns; quantized kernels have several."""
        return shards.leaves(self.abstract, self.plan, self.quant)

    def _cache_entry(self) -> quantized_cache.Entry | None:
        """Return the cache entry of the quantized kernels; None if nothing is quantized on load."""
        if self.quant is None or self.plan.held:
            return None
        return quantized_cache.entry(self.plan, self.quant, self.quant.sites(self.abstract))


def outline(
    path_or_hub_id: str | FilePath, request: ModelRequest, revision: str | None = None
) -> Outline:
    """Check a pretrained model without reading its weights.

    Args:
        path_or_hub_id: see `load`.
        request: how the model is to be loaded.
        revision: branch, tag or commit of a hub id.

    Raises:
        WeightsError: Files are missing, are not safetensors, or do not fit the model; it lists all
            problems.
        ConfigError: The architecture, one of its switches, or the task is not supported.
    """
    logs.show()
    source = sources.resolve(path_or_hub_id, revision)
    return outline_of(request, SafetensorsCheckpoint.open(source, read_model_config(source.folder)))


def outline_of(request: ModelRequest, checkpoint: Checkpoint) -> Outline:
    """Return the outline of a checkpoint loaded as requested.

    Raises:
        WeightsError: The tensors do not fit the model.
        ConfigError: Part of the request is not supported, or does not fit the checkpoint.
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
    found = Outline(model, abstract, config, plan, quant, checkpoint.meter)
    sites = quant.sites(abstract) if quant else {}  # raises before anything is read
    return found if request.vocab_size in (None, own) else _grow(found, request.vocab_size, sites)


def _options(request: ModelRequest, checkpoint: Checkpoint) -> ModelOptions:
    """Return the model options, with defaults for the request's open fields from the checkpoint."""
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
        ConfigError: A kernel that is to be quantized would grow, or each layer embeds the tokens.
    """
    model, own = outlined.model, outlined.abstract
    if getattr(model.config, "layer_embedding", None) is not None:
        raise ConfigError(
            f"vocab_size: {vocab_size} adds tokens, which have no embeddings for each layer"
            " (embed_tokens_per_layer), and adapter files store none; use the tokens that the model"
            " has, such as the unused ones of its tokenizer"
        )
    grown = model.clone(config=dataclasses.replace(model.config, vocab_size=vocab_size))
    wanted = paths.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, paths.get(own, path).dtype),
        abstract_params(grown),
    )
    for path, leaf in paths.walk(wanted):
        if path in quantized and leaf.shape != paths.get(own, path).shape:
            raise ConfigError(
                f"quant: {quantized[path].name} is to be quantized, but vocab_size={vocab_size}"
                " adds tokens to it; exclude it"
            )
    return dataclasses.replace(
        outlined, model=grown, abstract=wanted, plan=outlined.plan.grow(wanted)
    )


def _labels_of(config: Mapping[str, Any], task: str) -> int | None:
    """Return the number of labels in `config.json`, or transformers' default of 2."""
    if task in ("causal_lm", "encoder"):
        return None
    labels: Any = config.get("id2label")
    return len(labels) if isinstance(labels, dict) and labels else config.get("num_labels", 2)


def _pooling(task: str, checkpoint: Checkpoint) -> str | None:
    """Return mean pooling if the checkpoint lacks the pooler of its architecture, else None."""
    family = models.FAMILIES.get(str(checkpoint.config.get("model_type")))
    needed = family.own_pooler if family and task == "sequence_classification" else None
    if needed is None or checkpoint.holds(needed):
        return None
    _log.warning("the checkpoint has no pooler (%s); the classifier uses mean pooling", needed)
    return "mean"


def _new_leaves(
    model: Pretrained, wanted: tuple[Path, ...], seed: int
) -> dict[Path, np.ndarray[Any, Any]]:
    """Initialize the leaves of a new head, unsharded, so that they do not depend on the mesh."""
    if not wanted:
        return {}
    ids = np.zeros((1, 2), np.int32)

    @jax.jit
    def make(rng: jax.Array) -> list[jax.Array]:
        params = model.init(rng, ids)["params"]
        return [paths.get(params, path).astype(jnp.float32) for path in wanted]

    leaves = make(jax.random.key(seed))
    return {path: np.asarray(leaf) for path, leaf in zip(wanted, leaves, strict=True)}


def _report(loaded: Outline, params: Tree, seconds: float) -> None:
    size = sum(leaf.nbytes for _, leaf in paths.walk(params))
    dtypes = "/".join(sorted({str(leaf.dtype) for _, leaf in paths.walk(params)}))
    source = loaded.model.source
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
            "this process read %.1f MB; its devices store %.1f MB",
            loaded.meter.bytes / 1e6,
            held / 1e6,
        )


def _log_head(new: Iterable[Path], replaced: Sequence[str]) -> None:
    """Log the new leaves of a head, and the tensors of the checkpoint's that did not fit."""
    if modules := sorted({paths.text(path[:-1]) for path in new}):
        _log.info("newly initialized head: %s", ", ".join(modules))
    if replaced:
        _log.warning(
            "the checkpoint's head has a different number of labels and was newly initialized: %s",
            ", ".join(replaced),
        )
