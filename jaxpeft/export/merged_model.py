"""Merged models: folding the adapter into its base in float32, and writing a folder for
`transformers`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxpeft import kernels
from jaxpeft.core import paths, targets
from jaxpeft.core.folding import fold_site, parts_that_add
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.paths import Path, Tree
from jaxpeft.core.rewriting import adapter_names, trainable_mask
from jaxpeft.core.targets import Site
from jaxpeft.core.tree import FIXED, stack_leaves
from jaxpeft.errors import ConfigError
from jaxpeft.hub.adapters.settings import Settings
from jaxpeft.hub.loading import Outline
from jaxpeft.hub.weights import expert_tensors, safetensors_writing
from jaxpeft.hub.weights.safetensors_files import Tensor, open_folder
from jaxpeft.hub.weights.safetensors_writing import Readable
from jaxpeft.json_files import read_json
from jaxpeft.methods import MARKERS
from jaxpeft.methods.virtual_tokens import word_embedding
from jaxpeft.models import FAMILIES
from jaxpeft.models.base import Pretrained
from jaxpeft.models.composite import COMPOSITE
from jaxpeft.quant.quantize import Quant

HEADS = {
    "causal_lm": "ForCausalLM",
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "encoder": "",
}
"""Suffixes of `transformers` class names: `AutoModelForCausalLM`, `AutoModel`."""
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
    "additional_chat_templates/*",
)
_NOT_MERGED = (
    "torch_dtype",
    "num_labels",
    "_name_or_path",
    "quantization_config",
    "problem_type",
    COMPOSITE,
)
GENERATION = "generation_config.json"
_TEXT = (".json", ".txt", ".model", ".jinja")

# ------------------------------------------------------------------------------------------ merging


@dataclass
class _Drift:
    """The rounding error of merged leaves and the size of their change, as sums of squares."""

    rounding: float = 0.0
    change: float = 0.0

    def add(self, before: Any, exact: Any, kept: Any) -> None:
        old, wanted, got = (np.asarray(x).astype(np.float32) for x in (before, exact, kept))
        existing = tuple(slice(n) for n in old.shape)  # tokens may have been added
        wanted, got = wanted[existing], got[existing]
        self.rounding += float(np.linalg.norm(got - wanted)) ** 2
        self.change += float(np.linalg.norm(wanted - old)) ** 2


def dtype_of(outline: Outline, dtype: Any) -> np.dtype[Any]:
    """Return the dtype of a merged model: as requested, or that of the base's largest unquantized
    leaf.
    """
    if dtype is not None:
        return np.dtype(dtype)
    return max(outline.plan.sources.values(), key=lambda source: math.prod(source.shape)).dtype


def fold(method: Method, params: Tree, outline: Outline, dtype: Any) -> float:
    """Fold the adapter into the base in place, one module at a time to save memory.

    Args:
        method: the method that rewrote `params`; its layers are not stacked.
        params: the rewritten tree, which becomes the merged one.
        outline: outline of the base.
        dtype: dtype of all leaves; None keeps each leaf's dtype in the base.

    Returns:
        `||rounded - exact|| / ||exact - base||` over all leaves that differ from the base's; 0 if
        there are none.

    Raises:
        ConfigError: The method cannot be merged, or a value does not fit the dtype.
    """
    names, own = adapter_names(method), dtype_of(outline, dtype)
    trained = {path for path, flag in paths.walk(trainable_mask(method, params)) if flag}
    roots = {key: params.pop(key) for key in names & params.keys()}
    sites = {site.path: site for site in targets.find_sites(params, targets.KINDS)}
    drift = _Drift()

    def round_leaf(path: Path, exact: Any, before: Any) -> Any:
        source = outline.plan.sources.get(path)
        asked = dtype is not None and path[-1] not in FIXED
        leaf = exact.astype(own if asked or source is None else source.dtype)
        if leaf.dtype != exact.dtype and not bool(jnp.isfinite(leaf).all()):
            most = float(jnp.abs(exact).max())
            raise ConfigError(
                f"--dtype {leaf.dtype}: {paths.text(path)} overflows, its largest value is"
                f" {most:g}; use bfloat16 or float32"
            )
        if path in trained:
            before = source.read(None) if source else None
        if before is not None and not np.array_equal(
            np.asarray(before).astype(np.float32), np.asarray(exact)
        ):
            drift.add(before, exact, leaf)
        return leaf

    for module in dict.fromkeys(path[:-1] for path, _ in list(paths.walk(params))):
        node = paths.get(params, module)
        base = {
            key: leaf
            for key, leaf in node.items()
            if not isinstance(leaf, Mapping) and key not in names
        }
        site = sites.get(module)
        exact = _fold_module(method, site, node, base, roots) if site else {}
        for key in names & node.keys():
            del node[key]
        for key in base:
            node[key] = round_leaf(
                (*module, key), exact.get(key, base[key]), base[key] if key in exact else None
            )
    return math.sqrt(drift.rounding / drift.change) if drift.change else 0.0


def _fold_module(method: Method, site: Site, node: Leaves, base: Leaves, roots: Leaves) -> Leaves:
    """Return the float32 leaves of one module with its adapters folded in; empty if it has none."""
    exact = {key: jnp.asarray(leaf, jnp.float32) for key, leaf in base.items()}
    return fold_site(parts_that_add(method, MARKERS), site, {**node, **exact}, roots)


def round_to_quantized(params: Tree, quant: Quant) -> None:
    """Round kernels, in place, to the values of a quantized base; they become float32.

    Args:
        params: a tree whose layers are not stacked.
        quant: which kernels, and how.

    Raises:
        ConfigError: A kernel does not fit the number format.
    """
    for path, site in quant.sites(params).items():
        node = paths.get(params, path[:-1])
        stored = quant.store_layers(node["kernel"].__getitem__, site.layers)
        layers = ({key: leaf[i] for key, leaf in stored.items()} for i in np.ndindex(site.layers))
        node["kernel"] = stack_leaves(
            [kernels.read(one, site.shape) for one in layers], site.layers
        )


def untie_head(method: Method, model: Pretrained, params: Tree) -> Pretrained:
    """Untie the head if the embedding is adapted for token lookup but not in the head.

    Args:
        method: the method that rewrote `params`.
        model: the model from `load`.
        params: the rewritten tree, changed in place.

    Returns:
        The model with an untied head, or `model` itself.
    """
    if model.options.task != "causal_lm" or "lm_head" in params:
        return model
    node = paths.get(params, word_embedding(params).path)
    apart = [
        p
        for p in parts_that_add(method, MARKERS)
        if p.leaves.site and p.leaves.site[0] in node and "attend" not in p.sites.hooks
    ]
    if not apart:
        return model
    params["lm_head"] = {"kernel": node["embedding"].T}
    return model.clone(config=dataclasses.replace(model.config, tie_word_embeddings=False))


# --------------------------------------------------------------------------------------- the folder


@dataclass(frozen=True)
class _Leaf:
    """A leaf of the tree, with the interface of a tensor in a file."""

    leaf: Any
    transposed: bool

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape[::-1] if self.transposed else self.leaf.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        return np.dtype(self.leaf.dtype)

    @property
    def nbytes(self) -> int:
        return int(self.leaf.nbytes)

    def read(self) -> np.ndarray[Any, Any]:
        return np.asarray(self.leaf).T if self.transposed else np.asarray(self.leaf)


def tensors_of(model: Pretrained, params: Tree, dtype: Any) -> dict[str, Readable]:
    """Return the tensors of a merged model by their names in `transformers`.

    Args:
        model: the merged model.
        params: the merged tree; its layers are not stacked.
        dtype: the requested dtype; None keeps each leaf's dtype in the base.
    """
    own: dict[str, Readable] = {
        name: _Leaf(leaf[index] if index else leaf, path[-1] == "kernel")
        for path, leaf in paths.walk(params)
        for name, index in paths.named_items(path, leaf)
    }
    pooler = {name: tensor for name, tensor in _pooler(model).items() if name not in own}
    converted = {
        name: _Leaf(t.read().astype(t.dtype if dtype is None else dtype), transposed=False)
        for name, t in pooler.items()
    }
    return expert_tensors.join(own | converted, model.config)


def _pooler(model: Pretrained) -> dict[str, Tensor]:
    """Return the base's pooler, which some `transformers` classes require although jaxpeft does
    not use it.
    """
    family = FAMILIES.get(getattr(model.config, "kind", ""))
    task = model.options.task
    if family is None or not (
        any(re.fullmatch(pattern, "pooler.dense.weight") for pattern in family.optional)
        and (task == "encoder" or (task == "sequence_classification" and family.own_pooler))
    ):
        return {}
    prefix = "" if task == "encoder" else f"{family.prefix}."
    tensors = open_folder(model.source.folder)
    found = {
        re.search(r"(?:^|\.)(pooler\.dense\.(?:weight|bias))$", name): tensor
        for name, tensor in tensors.items()
    }
    return {prefix + match[1]: tensor for match, tensor in found.items() if match}


def config_of(
    model: Pretrained, base: Mapping[str, Any], settings: Settings, kept: bool, dtype: Any
) -> dict[str, Any]:
    """Return the `config.json` of a merged model: the base's, with the new head and dtype.

    Args:
        model: the merged model.
        base: content of the base's `config.json`.
        settings: settings of the run. If they have no label names, the base's are used, or
            `LABEL_0` and so on.
        kept: whether the head is the base's own, so that the base's labels and problem type are
            the defaults.
        dtype: dtype of the weights.
    """
    task, count = model.options.task, model.options.num_labels
    config = {key: value for key, value in base.items() if key not in _NOT_MERGED}
    config |= {"dtype": np.dtype(dtype).name, "vocab_size": model.config.vocab_size}
    stems = [
        re.sub(r"(For[A-Z]\w*|Model)$", "", str(name)) for name in base.get("architectures") or ()
    ]
    if stems:
        config["architectures"] = [stems[0] + (HEADS[task] or "Model")]
    if "tie_word_embeddings" in base or task == "causal_lm":
        config["tie_word_embeddings"] = getattr(
            model.config, "tie_word_embeddings", base.get("tie_word_embeddings")
        )
    if count is None:
        return config
    own = _labels_of(base) if kept else []
    names = next(
        (list(some) for some in (settings.labels, own) if len(some) == count),
        [f"LABEL_{i}" for i in range(count)],
    )
    config["id2label"] = {str(i): name for i, name in enumerate(names)}
    config["label2id"] = {name: i for i, name in enumerate(names)}
    problem = settings.problem_type or (base.get("problem_type") if kept else None)
    if task == "sequence_classification" and (problem or count == 1):
        config["problem_type"] = problem or "regression"
    if config.get("pad_token_id") is None and settings.pad_token_id is not None:
        # a decoder's classifier needs it to find the last token
        config["pad_token_id"] = settings.pad_token_id
    return config


def _labels_of(base: Mapping[str, Any]) -> list[str]:
    """Return the label names of a `config.json` in order; empty if their ids are not numbers."""
    names = base.get("id2label")
    if not isinstance(names, dict) or not all(str(key).isdecimal() for key in names):
        return []
    return [str(names[key]) for key in sorted(names, key=int)]


def write(
    folder: FilePath, tensors: Mapping[str, Readable], config: Mapping[str, Any], shard_bytes: int
) -> list[str]:
    """Write weights and config, and return the names of the weight files.

    Raises:
        ConfigError: The disk is full.
    """
    size, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(folder).free
    if size > free:
        raise ConfigError(
            f"--output: {folder.parent} needs {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        )
    files = safetensors_writing.write_model(folder, tensors, shard_bytes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return files


def copy_files(
    base: FilePath | None, adapter: FilePath, folder: FilePath, settings: Settings
) -> None:
    """Copy the tokenizer from the adapter, or else from the base, and the generation config.

    Args:
        base: folder of the base; None to copy nothing from it.
        adapter: folder of the adapter.
        folder: destination folder.
        settings: settings of the run; their end-of-answer token is added to the generation config.
    """
    tokenizer = adapter if base is None or (adapter / "tokenizer_config.json").is_file() else base
    wanted = [file for pattern in _TOKENIZER for file in tokenizer.glob(pattern)]
    for file in wanted:
        if file.is_file() and file.suffix in _TEXT:
            target = folder / file.relative_to(tokenizer)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)
    if base is not None:
        _write_generation_config(base, folder, settings.eos_token_id)


def _write_generation_config(base: FilePath, folder: FilePath, end: int | None) -> None:
    """Write the base's `generation_config.json`, with the end-of-answer token of training added."""
    file, ends = base / GENERATION, read_json(folder / "config.json").get("eos_token_id")
    content = read_json(file) if file.is_file() else {}
    ends = content.get("eos_token_id", ends)
    known = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if end is not None and end not in known:
        content["eos_token_id"] = [*known, end]
    if content:
        (folder / GENERATION).write_text(json.dumps(content, indent=2) + "\n")
