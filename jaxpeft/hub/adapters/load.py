"""Loading adapter folders, in the file format of Hugging Face PEFT or of another library."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import AdapterError, ConfigError, TargetError, WeightsError, shorten, show
from jaxpeft.hub.adapters import checks, companions, expert_parameters, peft_config
from jaxpeft.hub.adapters import extra as adapter_extra
from jaxpeft.hub.adapters import tensors as adapter_tensors
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA, FolderLayout
from jaxpeft.hub.adapters.layouts import LAYOUTS, PARTS
from jaxpeft.hub.adapters.pretrained_heads import with_pretrained_heads
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.adapters.tied_heads import tie_of
from jaxpeft.hub.base_identity import differences
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.json_files import read_json
from jaxpeft.methods import from_dict
from jaxpeft.models.base import Pretrained
from jaxpeft.transforms.rewrite import require_plain, rewrite

_log = logging.getLogger(__name__)


_SHOWN = 20
"""The maximum number of invalid tensors that a message lists."""


def _load_parts(
    folder: FilePath, model: Pretrained, params: Mapping[str, Any], allow_base: bool
) -> tuple[Method, Tree]:
    """Load the adapter leaves of each part, and the base's leaves that it trained.

    The method of a part is read from its files, so it may differ from the trained one: a method
    that is LoRA with a special initialization is loaded as plain LoRA.
    """
    content = _read_parts(folder / PARTS)
    leaves = dict(paths.walk(params))
    base, parts = frozenset(leaves), list[dict[str, Any]]()
    for name, recorded in zip(content["parts"], from_dict(content["method"]).parts(), strict=True):
        part, loaded = load_adapter(folder / str(name), model, params, allow_base=allow_base)
        mask = dict(paths.walk(trainable_mask(part, loaded)))
        leaves |= {
            path: leaf for path, leaf in paths.walk(loaded) if mask[path] or path not in base
        }
        parts.append(part.as_dict() | {"modules_to_save": recorded.modules_to_save})
    return from_dict(content["method"] | {"methods": parts}), paths.build(list(leaves.items()))


def parts_of(folder: FilePath) -> tuple[FilePath, ...]:
    """List the folders of an adapter's parts; the folder itself if it has a single method.

    Raises:
        AdapterError: The list of parts is invalid.
    """
    names = _read_parts(folder / PARTS)["parts"] if (folder / PARTS).is_file() else [""]
    return tuple(folder / str(name) for name in names)


def _read_parts(file: FilePath) -> dict[str, Any]:
    """Read the list of a mixed adapter's parts.

    Raises:
        AdapterError: It does not name a subfolder for each method.
    """
    try:
        content = read_json(file)
    except WeightsError as error:
        raise AdapterError(error.problems) from error
    names: Any = content.get("parts")
    method: Any = content.get("method")
    methods = method.get("methods") if isinstance(method, dict) else None
    fits = (
        isinstance(names, list)
        and names
        and isinstance(methods, list)
        and len(names) == len(methods)
    )
    if not fits or not all(isinstance(name, str) and FilePath(name).name == name for name in names):
        raise AdapterError(
            f"{file}: must have 'parts' with a folder for each method, and 'method'; save the"
            " adapter again"
        )
    return content


def read_settings(path: str | FilePath) -> Settings:
    """Read the settings saved with an adapter: label names, problem type, pooling, and so on.

    Args:
        path: the folder of an adapter.

    Returns:
        The settings; empty for an adapter saved by another library.

    Raises:
        AdapterError: The folder does not exist, or its `jaxpeft.json` is invalid.
    """
    folder = FilePath(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    first = parts_of(folder)[0]
    try:
        return parse_settings(adapter_extra.read_extra(first), first / EXTRA)
    except WeightsError as error:
        raise AdapterError(error.problems) from error


def load_adapter(
    path: str | FilePath, model: Pretrained, params: Mapping[str, Any], *, allow_base: bool = False
) -> tuple[Method, Tree]:
    """Load an adapter folder, written by jaxpeft or by Hugging Face PEFT, into a base.

    Args:
        path: the folder.
        model: the model from `load`.
        params: the base's parameters, not rewritten.
        allow_base: whether to accept a different base than the adapter was trained on.

    Returns:
        `(method, params)`: the method from the folder's config, and the rewritten tree with the
        folder's values.

    Raises:
        ConfigError: The tree is already rewritten.
        AdapterError: Files are missing or are pickles; the config has unsupported settings; the
            base or the task differs; or a tensor is missing, extra, misshaped or not finite.
    """
    folder = FilePath(path)
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder")
    if (folder / PARTS).is_file():
        return _load_parts(folder, model, params, allow_base)
    layout = layout_of(folder)
    try:
        extra = adapter_extra.read_extra(folder)
        config, header = layout.read(folder, model, params)
        check_base(folder, config, model, allow_base=allow_base)
        adapter_extra.warn_of_edits(folder, extra)
    except WeightsError as error:
        raise AdapterError(error.problems) from error
    if model.options.task == "encoder":
        config, header = _drop_pooler(config, header)
    config, header = expert_parameters.split(config, header, model, str(folder / CONFIG))
    header = _one_name(config, header, model, params, folder / layout.weights)
    method = peft_config.read(config, str(folder / CONFIG), params)
    method = method.peft.fit(method, {name: tensor.shape for name, tensor in header.items()})
    spelled = partial(companions.rename, method)
    header = {spelled(name): tensor for name, tensor in header.items()}
    header = with_pretrained_heads(method, header, model, params)
    header = adapter_tensors.without_copies(method, header, params)
    method = adapter_tensors.with_embeddings(method, header, params)
    require_plain(method, params)
    like = paths.map_with_path(lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    try:
        # an option may require more than the available memory: compare the file's shapes first
        problems = adapter_tensors.find_outgrown(method, header, params)
        if not problems:
            made = jax.eval_shape(
                partial(rewrite, method), like, jax.eval_shape(lambda: jax.random.key(0))
            )
            problems = checks.differences(method, made, header)
        rewritten = params if problems else rewrite(method, params, jax.random.key(0))
    except (TargetError, ConfigError) as error:
        raise AdapterError(
            [f"{folder / CONFIG}: {problem}" for problem in error.problems]
        ) from error
    if not problems:
        tensors = {name: tensor.read() for name, tensor in header.items()}
        problems = checks.wrong_numbers(method, rewritten, tensors)
        if not problems:
            adapter_extra.require_undamaged(folder, extra)
            loaded = adapter_tensors.put_tensors(method, rewritten, tensors)
            if any(".base_layer." in name for name in header):
                # leaves that the method derives from the base are derived from the file's weights
                base = paths.map_with_path(lambda path, _: paths.get(loaded, path), params)
                loaded = adapter_tensors.put_tensors(
                    method, rewrite(method, base, jax.random.key(0)), tensors
                )
            _log.info(
                "loaded %s adapter from %s (%d parameters)", method.name, folder, _size(header)
            )
            return method, loaded
    more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    show = [*map(spelled, problems[:_SHOWN]), *more]
    raise AdapterError([f"{folder / layout.weights}: {problem}" for problem in show])


def layout_of(folder: FilePath) -> FolderLayout:
    """Return the layout of a folder.

    Raises:
        AdapterError: Its weights are missing, or are a pickle.
    """
    for layout in LAYOUTS.values():
        if (folder / layout.weights).is_file():
            return layout
    pickles = [p.name for p in folder.glob("*.bin")]
    layout = next(
        (layout for layout in LAYOUTS.values() if layout.pickle in pickles), LAYOUTS["peft"]
    )
    inside = [
        str(p.parent)
        for layout in LAYOUTS.values()
        for p in sorted(folder.glob(f"*/{layout.weights}"))
    ]
    if pickles:
        why = (
            f"contains {next((n for n in pickles if n == layout.pickle), pickles[0])}, a pickle,"
            f" which is never read; {layout.fix}"
        )
    else:
        why = (
            f"contains adapters in {' and '.join(inside)}; name one of them"
            if inside
            else "is incomplete"
        )
    raise AdapterError(f"{folder}: no {layout.weights}: the folder {why}")


def _drop_pooler(
    config: dict[str, Any], header: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Remove the pooler of an encoder: hidden states do not depend on it, so it is not built."""
    targets = config.get("target_modules")
    if isinstance(targets, list):
        config = config | {
            "target_modules": [name for name in targets if "pooler" not in str(name).split(".")]
        }
    return config, {name: tensor for name, tensor in header.items() if ".pooler." not in name}


def _one_name(
    config: Mapping[str, Any],
    header: Mapping[str, Tensor],
    model: Pretrained,
    params: Mapping[str, Any],
    file: FilePath,
) -> dict[str, Tensor]:
    """Return the tensors of a file, with those of a tied head under the embedding's name."""
    kind = peft_config.method_of(config)
    tie, leaf = tie_of(kind.peft.module_prefix, model, params) if kind is not None else (None, None)
    if tie is None:
        return dict(header)
    names = {tie.embedding.split(".")[-2], "lm_head"}
    modules: Any = config.get("modules_to_save")
    saved = (
        tuple(str(name) for name in modules if str(name).rpartition(".")[2] in names)
        if isinstance(modules, list)
        else ()
    )
    return tie.one(header, file, saved, np.asarray(leaf))


def _size(header: Mapping[str, Any]) -> int:
    return sum(t.nbytes // t.dtype.itemsize for t in header.values())


def check_base(
    folder: FilePath, config: Mapping[str, Any], model: Pretrained, *, allow_base: bool = False
) -> None:
    """Raise an error if the base or the task differs from the adapter's.

    Weights are read only to compute the base's SHA-256.

    Args:
        folder: folder of the adapter.
        config: content of its `adapter_config.json`.
        model: the model to adapt.
        allow_base: whether to accept a different base, with a warning.

    Raises:
        AdapterError: There are differences; it lists all of them.
    """
    task = config.get("task_type")
    wanted = peft_config.TASK_TYPES[model.options.task]
    problems: list[str] = []
    if task is not None and task != wanted:
        problems.append(
            f"{folder / CONFIG}: task_type is {shorten(str(task))}, but the model is loaded for"
            f" {wanted}"
        )
    extra = adapter_extra.read_extra(folder)
    if extra.get("pooling", model.options.pooling) != model.options.pooling:
        problems.append(
            f"{folder / EXTRA}: pooling is {extra['pooling']!r}, but the model has"
            f" {model.options.pooling!r}"
        )
    tokens = extra.get("vocab_size", model.config.vocab_size)
    if tokens != model.config.vocab_size:
        problems.append(
            f"{folder / EXTRA}: vocab_size is {tokens}, but the model has"
            f" {model.config.vocab_size} tokens; load it with vocab_size={tokens}"
        )
    if extra.get("base_sha256") and model.source:
        other = differences(
            extra["base_sha256"], extra.get("base_config"), model.source, model.options.task
        )
        why = (
            f"{folder / EXTRA}: the adapter was trained on another base"
            f" ({show(config.get('base_model_name_or_path'))}), not {model.source.name}: "
        )
        if other and allow_base:
            _log.warning("%s%s", why, "; ".join(other))
        elif other:
            fix = (
                "load the base it was trained on, or allow this one (--allow-base, or"
                " allow_base=True of load_adapter)"
            )
            problems.append(f"{why}{'; '.join(other)}; {fix}")
    if problems:
        raise AdapterError(problems)
