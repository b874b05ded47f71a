"""A model from files, with or without an adapter, and everything that is needed to use it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from jaxpeft.choices import Task
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.data.pipeline import load_tokenizer
from jaxpeft.errors import ConfigError, WeightsError
from jaxpeft.hub import fetching, loading, sources
from jaxpeft.hub.adapters.adapter_folder import AdapterFolder, base_of, read_adapter, request_of
from jaxpeft.hub.adapters.folder_layout import CONFIG
from jaxpeft.hub.adapters.load import load_adapter
from jaxpeft.hub.adapters.settings import Settings
from jaxpeft.hub.model_request import ModelRequest
from jaxpeft.hub.sources import Source
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained
from jaxpeft.quant.quantize import Quant, read_quant
from jaxpeft.sharding.layout import layout
from jaxpeft.sharding.mesh import create_device_mesh, heads_of
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import sharding_rules

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class AdaptedModel:
    """A loaded model.

    Attributes:
        model: the Linen module.
        base: parameters of the base.
        params: parameters with the adapter, which shares the base's arrays; those of the base
            without an adapter.
        settings: settings of the run that trained the adapter; empty without one.
        method: method of the adapter; None without one.
        adapter: folder of the adapter; None without one.
        mesh: the devices that store the parameters; None for a single device.
    """

    model: Pretrained
    base: Tree
    params: Tree
    settings: Settings
    method: Method | None = None
    adapter: Path | None = None
    mesh: Mesh | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer saved with the adapter, which has its chat template; else the base's.

        Raises:
            DataError: There is no tokenizer, or it cannot be loaded.
        """
        return load_tokenizer(_own_tokenizer(self.adapter) or self.model.source)


def load_adapted(
    base: str | None = None,
    adapter: str | Path | None = None,
    *,
    task: Task | None = None,
    dtype: Any = None,
    compute_dtype: Any = None,
    pooling: str | None = None,
    vocab_size: int | None = None,
    quant: Quant | str | None = None,
    revision: str | None = None,
    sharding: MeshConfig | None = None,
    allow_base: bool = False,
) -> AdaptedModel:
    """Load a model, and an adapter into it.

    Args:
        base: folder or hub id of the base, or `package:NAME`; None for the one that the adapter
            records.
        adapter: folder of the adapter, or of the run that trained it; None for the base alone.
        task: the task; None for that of the adapter or of the base's files, or `causal_lm`.
        dtype: dtype of the base's leaves; None keeps the checkpoint's.
        compute_dtype: dtype of the activations; None uses `dtype`, or the checkpoint's.
        pooling: the sequence classifier's input; None for the adapter's.
        vocab_size: number of tokens with added ones; None for the adapter's.
        quant: quantization of the base; None for that of the adapter's run.
        revision: branch, tag or commit of a hub id.
        sharding: how the parameters are sharded over the devices; None for one device.
        allow_base: whether to accept a different base than the adapter was trained on.

    Raises:
        ConfigError: Neither a base nor an adapter is given, or they do not fit.
        AdapterError: The adapter is invalid, or belongs to another base.
        WeightsError: The base cannot be used.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "compute_dtype": compute_dtype,
        "quant": _quant(quant),
    }
    folder = None if adapter is None else read_adapter(Path(adapter))
    if folder is None:
        if base is None:
            raise ConfigError("--model: is required without --adapter; set its folder or hub id")
        name = base
        request = ModelRequest(
            task or task_of(base, revision), pooling=pooling, vocab_size=vocab_size, **options
        )
    else:
        name, recorded = base_of(folder, base)
        revision = revision or recorded
        if quant is None and folder.settings.quant is not None:
            options["quant"] = read_quant(folder.settings.quant, str(folder.folder))
        request = request_of(folder, task=task, pooling=pooling, vocab_size=vocab_size, **options)
    outlined = _outline(name, request, revision, folder, base)
    mesh, model, params = _read(outlined, sharding, log_head=folder is None)
    if folder is None:
        return AdaptedModel(model, params, params, Settings(), mesh=mesh)
    method, adapted = load_adapter(folder.folder, model, params, allow_base=allow_base)
    outlined.log_new_head(params, adapted)
    return AdaptedModel(model, params, adapted, folder.settings, method, folder.folder, mesh)


def read_tokenizer(base: str | None, adapter: str | Path | None) -> tuple[Any, Settings]:
    """Return the tokenizer of a model, and the settings of the adapter's run, without loading the
    model.

    Args:
        base: see `load_adapted`.
        adapter: see `load_adapted`.

    Raises:
        ConfigError: No base is given or recorded.
        AdapterError: The adapter is invalid.
        DataError: There is no tokenizer, or it cannot be loaded.
    """
    if adapter is None:
        return load_tokenizer(sources.resolve(str(base), None)), Settings()
    folder = read_adapter(Path(adapter))
    source = _own_tokenizer(folder.folder) or sources.resolve(*base_of(folder, base))
    return load_tokenizer(source), folder.settings


def _own_tokenizer(adapter: Path | None) -> Source | None:
    """Return the folder of an adapter as the source of a tokenizer, if it contains one."""
    if adapter is None or not all((adapter / name).is_file() for name in _TOKENIZER_FILES):
        return None
    return Source(str(adapter), adapter)


def task_of(base: str, revision: str | None = None) -> Task:
    """Return the task of a base's head according to its `config.json`; `causal_lm` if unknown."""
    content = read_json(sources.resolve(base, revision).folder / "config.json")
    names = content.get("architectures")
    named = str(names[0]) if isinstance(names, list) and names else ""
    ends: dict[str, Task] = {
        "ForSequenceClassification": "sequence_classification",
        "ForTokenClassification": "token_classification",
    }
    found: list[Task] = [task for end, task in ends.items() if named.endswith(end)]
    return found[0] if found else "causal_lm"


def _quant(quant: Quant | str | None) -> Quant | None:
    return Quant(quant) if isinstance(quant, str) else quant


def _outline(
    name: str,
    request: ModelRequest,
    revision: str | None,
    folder: AdapterFolder | None,
    base: str | None,
) -> loading.Outline:
    try:
        return loading.outline(name, request, revision)
    except WeightsError as error:
        if folder is None or base is not None:
            raise
        where = folder.parts[0] / CONFIG
        hint = f"this base is named in {where}; set its path with --model"
        raise WeightsError([*error.problems, hint]) from error


def _read(
    outlined: loading.Outline, sharding: MeshConfig | None, *, log_head: bool
) -> tuple[Mesh | None, Pretrained, Tree]:
    """Read the parameters, sharded over a mesh if requested."""
    if sharding is None:
        return None, outlined.model, outlined.read(log_head=log_head)
    mesh = create_device_mesh(sharding, heads=heads_of(outlined.config))
    rules = sharding_rules(sharding)
    fetching.require_host_memory(rules, mesh)
    found = layout(mesh, rules, outlined.leaves)
    model = fetching.fetch_kernels(outlined.model, found)
    return mesh, model, outlined.read_sharded(found, 0, log_head=log_head)


def with_params(loaded: AdaptedModel, params: Mapping[str, Any]) -> AdaptedModel:
    """Return a model with other parameters, such as those of its base."""
    return dataclasses.replace(loaded, params=dict(params))
