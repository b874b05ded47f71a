"""Saving and loading adapter folders, in the file format of Hugging Face PEFT or of another
library: `save_adapter`, `load_adapter`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path as FilePath
from typing import Any

import jax
import numpy as np

import jaxpeft
from jaxpeft import atomic, kernels
from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.rewriting import trainable_mask
from jaxpeft.errors import AdapterError, ConfigError, TargetError, WeightsError, shorten, show
from jaxpeft.hub.adapters import beside, checks, peft_config
from jaxpeft.hub.adapters import card as adapter_card
from jaxpeft.hub.adapters import extra as adapter_extra
from jaxpeft.hub.adapters import tensors as adapter_tensors
from jaxpeft.hub.adapters.adapterhub import AdapterHub
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA, Content, FolderLayout
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.adapters.tied_heads import tie_of
from jaxpeft.hub.base_identity import architecture, differences, fingerprint
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.hub.weights.safetensors_writing import write_arrays
from jaxpeft.json_files import read_json
from jaxpeft.methods import from_dict
from jaxpeft.models.base import Pretrained, abstract_params
from jaxpeft.transforms.rewrite import require_plain, rewrite

CARD, PARTS = "README.md", "jaxpeft_parts.json"
LAYOUTS: Mapping[str, FolderLayout] = {"peft": FolderLayout(), "adapters": AdapterHub()}
"""The layouts of adapter folders by name."""
_SHOWN = 20
"""The maximum number of invalid tensors that a message lists."""
_log = logging.getLogger(__name__)


def save_adapter(
    path: str | FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    *,
    labels: tuple[str, ...] = (),
    settings: Settings | None = None,
    tokenizer: Any = None,
) -> None:
    """Save a trained adapter and head as a Hugging Face PEFT adapter folder, without the base.

    Writes `adapter_config.json` and `adapter_model.safetensors`, which `peft` can load, and
    `jaxpeft.json` with the settings of the run (`read_settings`), the identity of the base, and the
    SHA-256 of every tensor. Bottleneck adapters are saved in the format of the `adapters` library:
    `adapter_config.json` and `adapter.safetensors`, and `head_config.json` and
    `model_head.safetensors`. Each file is written atomically, the weights last.

    Args:
        path: the folder; created if necessary.
        method: the method that rewrote `params`.
        params: the rewritten tree.
        model: the model from `load`.
        labels: label names of a classifier, in order.
        settings: further settings of the run, such as the problem type; those that follow from the
            model are filled in.
        tokenizer: a `transformers` tokenizer to save in the same folder, with its chat template.

    Raises:
        AdapterError: A leaf is not finite, or cannot be stored in the files; or the labels do not
            match the head.
    """
    folder = FilePath(path)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder}: is a file; choose a folder to save the adapter to")
    _check_tree(method, params, model)
    decided = _complete(settings or Settings(), model, labels)
    save = _save_one if beside.split(method) else _save_parts
    save(folder, method, params, model, decided)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if save is _save_one:
        # left by an earlier adapter, which would be loaded instead of this one
        (folder / PARTS).unlink(missing_ok=True)


def _save_one(
    folder: FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    settings: Settings,
) -> None:
    """Save the adapter of one method, and of the additional ones that its files can store."""
    folder.mkdir(parents=True, exist_ok=True)
    main, others = beside.split(method) or (method, ())
    tensors = adapter_tensors.to_tensors(method, params)
    tie, _ = tie_of(method.peft.module_prefix, model, params)
    tied = tie is not None and f"{tie.embedding}weight" in tensors
    if tie is not None and tied:
        tensors[f"{tie.head}weight"] = tensors[f"{tie.embedding}weight"].copy()
    broken = [name for name, tensor in tensors.items() if not np.isfinite(tensor).all()]
    if broken:
        raise AdapterError(
            [f"{folder}: {name} contains NaN or infinity; not saved" for name in broken]
        )
    saved = adapter_tensors.saved_modules(method, params)
    name, revision = _base_name(model)
    config = peft_config.write(main, model.options.task, name, revision, saved)
    sites = sorted(_site_names(main, params))
    config |= _explicit_targets(config, sites) | main.peft.base_sizes(main, params, model.config)
    tensors = {beside.rename(method, name): tensor for name, tensor in tensors.items()}
    config |= beside.write_options(
        main, {name: part for part in others for name in _site_names(part, params)}
    )
    if tied:
        config["ensure_weight_tying"] = True
    layout = LAYOUTS[main.peft.layout]
    _require_alone(folder, layout)
    files = layout.files(Content(config, tensors, sites, model, settings.labels))
    files |= {EXTRA: adapter_extra.extra_content(settings, files)}
    card = adapter_card.text(main, layout, config, settings) + _pooling_note(layout, model)
    atomic.write_text(folder / CARD, card)
    for name in sorted(
        files, key=lambda name: (name.endswith(".safetensors"), name == layout.weights)
    ):
        if name.endswith(".json"):
            atomic.write_text(folder / name, json.dumps(files[name], indent=2) + "\n")
        else:
            with atomic.replace_when_done(folder / name) as temporary:
                write_arrays(files[name], temporary)
    _log.info(
        "saved %d tensors (%.1f kB) to %s",
        len(tensors),
        sum(t.nbytes for t in tensors.values()) / 1e3,
        folder,
    )


def _site_names(method: Method, params: Mapping[str, Any]) -> set[str]:
    return {
        entry.site.name for entry in adapter_tensors.find_adapted(method, params) if entry.site.path
    }


def _base_name(model: Pretrained) -> tuple[str, str | None]:
    """Return the base's name and revision for other libraries; a packaged model's name is its
    folder.
    """
    source = model.source
    if source is None:
        return "", None
    return (
        (str(source.folder), None)
        if source.name.startswith("package:")
        else (source.name, source.revision)
    )


def _require_alone(folder: FilePath, layout: FolderLayout) -> None:
    """Raise an error if a folder already contains an adapter in another layout."""
    for other in LAYOUTS.values():
        if other is not layout and (folder / other.weights).is_file():
            raise AdapterError(
                f"{folder}: contains {other.weights}, an adapter of {other.library}; choose another"
                " folder"
            )


def _save_parts(
    folder: FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    settings: Settings,
) -> None:
    """Save a mixed method as one folder per part, each loadable by `peft`, and their list."""
    names: list[str] = []
    for part in method.parts():
        name = part.name if part.name not in names else f"{part.name}_{len(names)}"
        names.append(name)
        own = dataclasses.replace(
            part, modules_to_save=(*method.modules_to_save, *part.modules_to_save)
        )
        _save_one(folder / name, own, params, model, settings)
    content = {"jaxpeft_version": jaxpeft.__version__, "parts": names, "method": method.as_dict()}
    atomic.write_text(folder / PARTS, json.dumps(content, indent=2) + "\n")


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


def _check_tree(method: Method, params: Mapping[str, Any], model: Pretrained) -> None:
    """Raise an error if a tree is not the result of the method's rewrite of the model."""
    present = {p for p, _ in paths.walk(params)}
    present |= {(*p[:-1], "kernel") for p in present if p[-1] in kernels.FORMS}
    missing = [p for p, _ in paths.walk(abstract_params(model)) if p not in present]
    if missing:
        show = ", ".join(paths.text(p) for p in missing[:3])
        raise AdapterError(
            f"params: {len(missing)} leaves of the model are missing, such as {show}; pass the"
            " complete tree"
        )
    problems = checks.mismatches(method, params)
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise AdapterError(
            [
                "params do not match this method; save with the method that rewrote them",
                *problems[:5],
                *more,
            ]
        )


def _explicit_targets(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return full site names if PEFT would interpret the target options differently.

    `all-linear` may select other modules in another model, and PEFT does not find layer numbers in
    names such as `layers.0`, with no dot in front (a backbone alone).
    """
    wanted = config.get("target_modules")
    unseen = config.get("layers_to_transform") is not None and any(
        re.match(r".*\.[^.]*\.\d+\.", name) is None for name in names
    )
    if unseen:
        return {"target_modules": names, "layers_to_transform": None, "layers_pattern": None}
    return (
        {"target_modules": names}
        if isinstance(wanted, str) and wanted.lower() in ("all-linear", "default")
        else {}
    )


def _complete(settings: Settings, model: Pretrained, labels: tuple[str, ...]) -> Settings:
    """Return the settings completed from the model, with the same checks as for a file."""
    options = model.options
    completed = dataclasses.replace(
        settings,
        task=options.task,
        num_labels=options.num_labels,
        labels=tuple(labels) or settings.labels,
        pooling=options.pooling,
        vocab_size=model.config.vocab_size,
        quant=options.quant.as_dict() if options.quant else None,
        base_sha256=fingerprint(model.source) if model.source else None,
        base_config=architecture(model.source) if model.source else None,
    )
    return parse_settings(json.loads(json.dumps(completed.as_dict())), FilePath("save_adapter"))


def _pooling_note(layout: FolderLayout, model: Pretrained) -> str:
    """Return a note for the card if `transformers` pools differently, so that its logits differ."""
    how, own = model.options.pooling, model.config.own_pooling
    if model.options.task != "sequence_classification" or how == own:
        return ""
    note = (
        f"the classifier uses pooling={how!r}, but transformers uses {own!r}, so its logits in"
        f" {layout.name} differ"
    )
    _log.warning("%s; load the adapter with jaxpeft.load(..., pooling=%r)", note, how)
    return (
        f"\nNote: {note}. Load it with `jaxpeft.load(..., pooling={how!r})` and"
        " `jaxpeft.load_adapter`.\n"
    )


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
    header = _one_name(config, header, model, params, folder / layout.weights)
    method = peft_config.read(config, str(folder / CONFIG), params)
    method = method.peft.fit(method, {name: tensor.shape for name, tensor in header.items()})
    spelled = partial(beside.rename, method)
    header = {spelled(name): tensor for name, tensor in header.items()}
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
