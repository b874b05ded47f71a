"""Loading a pretrained model: `load`."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft import logs, models
from jaxpeft.core import paths, tree
from jaxpeft.core.paths import Path, Tree
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub import bitsandbytes, merge_record, quantised_cache, shards, sources, weights
from jaxpeft.hub.safetensors_files import Meter, open_folder
from jaxpeft.json_files import read_json
from jaxpeft.models.attention import KERNELS, fastest, platform
from jaxpeft.models.base import Options, Pretrained, abstract_params
from jaxpeft.quant.tree import Quant

Task = Literal["causal_lm", "sequence_classification", "token_classification", "encoder"]
TASKS: tuple[Task, ...] = ("causal_lm", "sequence_classification", "token_classification", "encoder")
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
    cache: bool = True,
) -> tuple[Pretrained, Tree]:
    """Loads a pretrained model: a Linen module and its parameters.

    Args:
        path_or_hub_id: a folder with `config.json` and safetensors weights, a hub id, or `package:NAME`.
        task: which head; `encoder` gives hidden states.
        num_labels: of a classification head; None takes it from the labels in `config.json`.
        dtype: of the base's leaves; None keeps the file's. A newly made head is float32.
        compute_dtype: of the activations; None takes `dtype`, or the file's.
        scan_layers: whether the layers are stacked and scanned (faster to compile) or unrolled (faster to run).
        pooling: what a sequence classifier reads: `pooler`, `cls`, `mean`, `last`; None takes the architecture's own.
        remat: what the backward pass computes again: `none`, `products`, `attention`, `full`, `offload`.
        attention: the kernel that computes attention where it fits: `xla`, `cudnn`, `splash`; `auto` takes the fastest of the platform.
        revision: of a hub id: branch, tag or commit.
        vocab_size: of the embedding and the language-model head, where tokens were added to the tokenizer; the new rows begin
            as the mean of the others. None keeps the model's.
        quant: `nf4`, `int4`, `int8`, `fp8`, or a `jaxpeft.Quant` that says which kernels: they are quantised as they are read, one
            layer after the other, so that the model never exists as a whole in more bits. Embeddings and heads stay as they are.
            A checkpoint that `bitsandbytes` has quantised to NF4 is read as it is, with None or `nf4`.
        seed: for the leaves of a newly made head.
        sharding: a `jax.sharding.Sharding` for all leaves, or a function that gives that of each leaf by its path, as it is
            stored (a quantised kernel as the leaves that hold it); None for the first device. A process reads the parts of the
            files that its own devices hold, and the numbers are the same on any of them.
        cache: whether quantised kernels of more than a gigabyte are kept on disk, and read from there the next time; the
            environment's `JAXPEFT_CACHE` says where, or `off`. Several processes keep none.

    Returns:
        `(model, params)`; `model` records where it came from in `model.source`.

    Raises:
        WeightsError: files are missing, are not safetensors, or do not fit the model; all problems at once.
        ConfigError: the architecture, one of its switches, or the task is not supported.
    """
    outlined = outline(
        path_or_hub_id, task=task, num_labels=num_labels, dtype=dtype, compute_dtype=compute_dtype,
        scan_layers=scan_layers, pooling=pooling, remat=remat, attention=attention, revision=revision, vocab_size=vocab_size, quant=quant,
    )  # fmt: skip
    return outlined.model, outlined.read(seed, sharding, cache=cache)


@dataclass(frozen=True)
class Outline:
    """A pretrained model of which everything is known but the numbers.

    Attributes:
        model: the Linen module.
        abstract: shape and dtype of every leaf, as the module has them.
        stored: the same as the checkpoint has them: they differ where tokens are added.
        config: the content of `config.json`.
        plan: where each leaf is to be read from.
        quant: which kernels are quantised as they are read, and how; None for none.
        meter: how many bytes of the checkpoint's tensors were read.
    """

    model: Pretrained
    abstract: Tree
    stored: Tree
    config: Mapping[str, Any]
    plan: weights.WeightPlan
    quant: Quant | None = None
    meter: Meter = field(default_factory=Meter, compare=False)

    def read(self, seed: int = 0, sharding: shards.Places | None = None, *, cache: bool = True) -> Tree:
        """Reads the numbers, slice by slice: see `load`.

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
        place = self._cached() if cache else None
        cached = place.opened() if place else None
        params = shards.read(self.abstract, cached or self.plan, new, sharding, self.quant)
        if place and not cached:
            place.write(params)
        _report(self, params, time.perf_counter() - started)
        return params

    @property
    def leaves(self) -> Tree:
        """Shape and dtype of every leaf as `read` gives it: a quantised kernel as the leaves that hold it."""
        return shards.leaves(self.abstract, self.plan, self.quant)

    def _cached(self) -> quantised_cache.Entry | None:
        """Gives the place of the quantised kernels on disk; None where there are none, or the files have them."""
        if self.quant is None or self.plan.held:
            return None
        return quantised_cache.entry(self.plan, self.quant, self.quant.sites(self.abstract))


def outline(
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
    right_padded: bool = False,
) -> Outline:
    """Finds out everything about a pretrained model but its numbers: what can be refused is, before any is read.

    The arguments are those of `load`, and so is what it raises; `right_padded` says that rows are padded behind their tokens
    alone, of which a decoder's attention then need not be told.
    """
    logs.show()
    if task not in TASKS:
        raise ConfigError(f"task: must be one of {', '.join(TASKS)}, is {task!r}")
    source = sources.resolve(path_or_hub_id, revision)
    config = read_json(source.folder / "config.json")
    meter = Meter()
    tensors: weights.Tensors = bitsandbytes.gathered(open_folder(source.folder, meter))
    dtype, compute_dtype = _floating("dtype", dtype), _floating("compute_dtype", compute_dtype)
    compute = compute_dtype or dtype or _own_dtype(tensors)
    labels = num_labels if num_labels is not None else _labels_of(config, task)
    how = Quant(quant) if isinstance(quant, str) else quant
    options = Options(
        task=task,
        num_labels=labels,
        dtype=compute,
        scan_layers=scan_layers,
        pooling=pooling or _pooling(config, task, tensors),
        remat=remat,
        attention=_attention(attention),
        right_padded=right_padded,
        quant=how,
    )
    where = source.folder / "config.json"
    model = models.build(config, options, str(where)).clone(source=source)
    family = models.FAMILIES[config["model_type"]]
    weights.require_sizes(model.config, tensors, family, where)
    own = model.config.vocab_size
    if vocab_size is not None and vocab_size < own:
        raise ConfigError(
            f"vocab_size: {vocab_size} is less than the model's {own} tokens; tokens can be added, not removed"
        )
    abstract = abstract_params(model)
    if task == "causal_lm" and model.config.tie_word_embeddings:
        tensors = weights.untie(tensors, source.folder)
    plan = weights.plan(abstract, tensors, family, dtype, source.folder, relabel=num_labels is not None)
    if plan.held or config.get("quantization_config"):
        how = _quantised_already(source.folder, abstract, plan, how)
        model = model.clone(options=dataclasses.replace(model.options, quant=how))
    quantised = how.sites(abstract) if how else {}  # what does not fit is told before anything is read
    if vocab_size in (None, own):
        return Outline(model, abstract, abstract, config, plan, how, meter)
    grown = model.clone(config=dataclasses.replace(model.config, vocab_size=vocab_size))
    wanted = paths.map_with_path(
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, paths.get(abstract, path).dtype), abstract_params(grown)
    )
    for path, leaf in paths.walk(wanted):
        if path in quantised and leaf.shape != paths.get(abstract, path).shape:
            raise ConfigError(
                f"quant: {quantised[path].name} is to be quantised, and vocab_size={vocab_size} gives it more tokens; exclude it"
            )
    return Outline(grown, wanted, abstract, config, plan.grown(wanted), how, meter)


def _quantised_already(folder: FilePath, abstract: Tree, plan: weights.WeightPlan, asked: Quant | None) -> Quant:
    """Says which kernels of a checkpoint are quantised, and how, and refuses to quantise them otherwise."""
    if not plan.held:
        raise WeightsError(
            f"{folder}: quantization_config of config.json says that the weights are quantised, and none is; remove it there, and "
            "give quant='nf4' to quantise them"
        )
    found = Quant.of("nf4", abstract, plan.held.keys())
    if asked not in (None, Quant("nf4"), found):
        raise ConfigError(
            f"quant: is {asked}, and {folder} is quantised already, as {found}; leave quant out, or give the unquantised model"
        )
    return found


def _own_dtype(tensors: weights.Tensors) -> Any:
    """Gives the dtype of the largest tensor of a checkpoint, float32 in place of float64."""
    floats = [t for t in tensors.values() if jnp.issubdtype(t.dtype, jnp.floating)]
    own = max(floats, key=lambda t: t.nbytes).dtype if floats else jnp.dtype(jnp.float32)
    return jnp.dtype(jnp.float32) if own == np.float64 else own


def _attention(kernel: str) -> str:
    if kernel == "auto":
        return fastest(platform(jax.devices()[0]))
    if kernel not in KERNELS:
        raise ConfigError(f"attention: must be one of auto, {', '.join(KERNELS)}, is {kernel!r}")
    return kernel


def _floating(name: str, dtype: Any) -> Any:
    if dtype is None:
        return None
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        raise ConfigError(f"{name}: {dtype!r} is no dtype; give float32, bfloat16 or float16") from None
    if found not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise ConfigError(f"{name}: must be float32, bfloat16 or float16, is {found}")
    return found


def _labels_of(config: dict[str, Any], task: str) -> int | None:
    """Gives the number of labels that `config.json` names, or transformers' default, 2."""
    if task in ("causal_lm", "encoder"):
        return None
    named = config.get("id2label")
    return len(named) if isinstance(named, dict) and named else config.get("num_labels", 2)


def _pooling(config: dict[str, Any], task: str, tensors: Mapping[str, Any]) -> str | None:
    """Chooses mean pooling for a checkpoint that lacks the pooler of its architecture: a random one is nobody's wish."""
    family = models.FAMILIES.get(str(config.get("model_type")))
    needed = family.own_pooler if family and task == "sequence_classification" else None
    if needed is None or any(name.endswith(needed) for name in tensors):
        return None
    _log.warning("the checkpoint has no pooler (%s); the classifier reads the mean over tokens", needed)
    return "mean"


def _new_leaves(model: Pretrained, wanted: tuple[Path, ...], seed: int) -> dict[Path, np.ndarray[Any, Any]]:
    """Makes the leaves of a new head whole, on one device of each process: the numbers do not depend on how they are spread."""
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
    name = "" if source is None else source.name + (f" at {source.revision}" if source.revision else "")
    _log.info(
        "loaded %s (%s): %.1f M parameters, %.1f MB as %s, in %.1f s",
        name, loaded.config["model_type"], tree.count(params) / 1e6, size / 1e6, dtypes, seconds,
    )  # fmt: skip
    if jax.process_count() > 1:
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
        _log.info("this process read %.1f MB, its devices hold %.1f MB", loaded.meter.bytes / 1e6, held / 1e6)
    if plan.new:
        _log.info("newly made head: %s", ", ".join(sorted({paths.text(path[:-1]) for path in plan.new})))
    if plan.replaced:
        _log.warning(
            "the checkpoint's head is for another number of labels and was made newly: %s", ", ".join(plan.replaced)
        )
