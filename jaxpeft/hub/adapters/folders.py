"""Adapter folders in the file format of Hugging Face PEFT, or of a method's own library:
`save_adapter`, `load_adapter`.
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
"""Every layout of adapter folders, by the name that methods give."""
_SHOWN = 20
"""Of how many tensors that are not as they must be a message tells."""
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
    """Save what a method trained as a Hugging Face PEFT adapter folder: the adapter and the head,
    never the base.

    Writes `adapter_config.json` and `adapter_model.safetensors`, which `peft` loads, and
    `jaxpeft.json` with what the run decided (`read_settings`), the identity of the base, and the
    SHA-256 of every tensor. Bottleneck adapters are saved as the `adapters` library has them:
    `adapter_config.json` and `adapter.safetensors`, and `head_config.json` and
    `model_head.safetensors`. Each file appears whole or not at all, the weights last.

    Args:
        path: the folder; made if need be.
        method: the method that rewrote `params`.
        params: the rewritten tree.
        model: what `load` gave.
        labels: names of a classifier's labels, in order.
        settings: what else the run decided, such as the problem type; what the model says itself is
            filled in.
        tokenizer: of `transformers`, whose files are saved beside the adapter, with the chat
            template that it has.

    Raises:
        AdapterError: a leaf that is to be saved is not finite, or has no place in the files; or the
            labels are not those of the head.
    """
    folder = FilePath(path)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder}: is a file; give a folder to save the adapter to")
    _check_whole(method, params, model)
    decided = _complete(settings or Settings(), model, labels)
    save = _save_one if beside.split(method) else _save_parts
    save(folder, method, params, model, decided)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if save is _save_one:
        (folder / PARTS).unlink(
            missing_ok=True
        )  # of an earlier adapter, which would be loaded in this one's place


def _save_one(
    folder: FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    settings: Settings,
) -> None:
    """Save one method's adapter, and those that its files hold beside it, of a tree that may hold
    others'.
    """
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
            [f"{folder}: {name} holds NaN or infinity; not saved" for name in broken]
        )
    whole = adapter_tensors.saved_modules(method, params)
    name, revision = _base_name(model)
    config = peft_config.write(main, model.options.task, name, revision, whole)
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
    """Return name and revision of the base for other libraries, which know of a package the folder
    that it holds alone.
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
    """Refuse a folder that holds an adapter in another layout: which of the two is meant, nobody
    could tell.
    """
    for other in LAYOUTS.values():
        if other is not layout and (folder / other.weights).is_file():
            raise AdapterError(
                f"{folder}: holds {other.weights}, an adapter of {other.library}; give a folder of"
                " its own"
            )


def _save_parts(
    folder: FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    settings: Settings,
) -> None:
    """Save a method made of methods as one adapter folder a part, each of which `peft` loads, and
    the list of them.
    """
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
    """Load what `_save_parts` saved: the adapter leaves of each part, and the leaves of the base
    that it trained.

    The parts are what their files say, which may be another method than was trained: a plain LoRA
    for one with a start.
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
    """List the folders of the methods that an adapter is made of: itself, if it is of one.

    Raises:
        AdapterError: the list of them cannot be used.
    """
    names = _read_parts(folder / PARTS)["parts"] if (folder / PARTS).is_file() else [""]
    return tuple(folder / str(name) for name in names)


def _read_parts(file: FilePath) -> dict[str, Any]:
    """Read the list of a mixed adapter's parts.

    Raises:
        AdapterError: it names no folders inside its own, or not one for each method.
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
            f"{file}: must name a folder for each method in 'parts', and the methods; save the"
            " adapter again"
        )
    return content


def _check_whole(method: Method, params: Mapping[str, Any], model: Pretrained) -> None:
    """Refuse a tree that is not what the method made of the model."""
    there = {p for p, _ in paths.walk(params)}
    there |= {
        (*p[:-1], "kernel") for p in there if p[-1] in kernels.FORMS
    }  # whatever form holds it
    missing = [p for p, _ in paths.walk(abstract_params(model)) if p not in there]
    if missing:
        show = ", ".join(paths.text(p) for p in missing[:3])
        raise AdapterError(
            f"params: {len(missing)} leaves of the model are missing, such as {show}; give the"
            " whole tree"
        )
    problems = checks.mismatches(method, params)
    if problems:
        more = [f"... and {len(problems) - 5} more"] if len(problems) > 5 else []
        raise AdapterError(
            [
                "params are not what this method makes; save with the method that rewrote them",
                *problems[:5],
                *more,
            ]
        )


def _explicit_targets(config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    """Return full names of sites where PEFT would read the target options otherwise.

    `all-linear` would mean other modules in another model, and the numbers of layers that no dot
    stands before (`layers.0` of a backbone alone) PEFT does not see.
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
    """Return the settings with what the model says, checked as those of a file are."""
    options = model.options
    made = dataclasses.replace(
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
    return parse_settings(json.loads(json.dumps(made.as_dict())), FilePath("save_adapter"))


def _pooling_note(layout: FolderLayout, model: Pretrained) -> str:
    """Return where a classifier reads what `transformers` does not, so that its logits in the
    library are others.
    """
    how, own = model.options.pooling, model.config.own_pooling
    if model.options.task != "sequence_classification" or how == own:
        return ""
    note = (
        f"the classifier reads pooling={how!r}; transformers reads {own!r}, so in {layout.name} its"
        " logits are others"
    )
    _log.warning("%s; load the adapter with jaxpeft.load(..., pooling=%r)", note, how)
    return (
        f"\nNote: {note}. Load it with `jaxpeft.load(..., pooling={how!r})` and"
        " `jaxpeft.load_adapter`.\n"
    )


def read_settings(path: str | FilePath) -> Settings:
    """Read what a run decided that goes with its adapter: the names of the labels, the problem
    type, the pooling, and so on.

    Args:
        path: the folder of an adapter.

    Returns:
        The settings; of an adapter that another library has saved, empty ones.

    Raises:
        AdapterError: there is no such folder, or its `jaxpeft.json` cannot be used.
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
    """Load an adapter folder, written by jaxpeft or by Hugging Face PEFT, onto a base.

    Args:
        path: the folder.
        model: what `load` gave.
        params: the base's parameters, not rewritten.
        allow_base: whether the base may be another one than the adapter was trained on.

    Returns:
        `(method, params)`: the method as the folder's config says, and the rewritten tree with the
        folder's numbers.

    Raises:
        ConfigError: the tree is rewritten already.
        AdapterError: files are missing or are pickles; the config asks for what is not supported;
            the base or the task is another one; or a tensor is missing, extra, misshaped or not
            finite. Nothing is loaded half.
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
        # an option may ask for more than the memory holds: the file's shapes are compared first
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
            if any(
                ".base_layer." in name for name in header
            ):  # what a method takes from the base, it takes from the file's
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
        AdapterError: its weights are missing, or are a pickle.
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
            f"holds {next((n for n in pickles if n == layout.pickle), pickles[0])}, a pickle, which"
            f" is never read; {layout.fix}"
        )
    else:
        why = (
            f"holds adapters in {' and '.join(inside)}; name one of them"
            if inside
            else "is incomplete"
        )
    raise AdapterError(f"{folder}: no {layout.weights}: the folder {why}")


def _drop_pooler(
    config: dict[str, Any], header: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Leave out what PEFT trains in the pooler of an encoder: hidden states do not depend on it, so
    it is not built.
    """
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
    """Return the tensors of a file, those of a tied head under the embedding's name."""
    kind = peft_config.method_of(config)
    tie, leaf = tie_of(kind.peft.module_prefix, model, params) if kind is not None else (None, None)
    if tie is None:
        return dict(header)
    names = {tie.embedding.split(".")[-2], "lm_head"}
    given: Any = config.get("modules_to_save")
    saved = (
        tuple(str(one) for one in given if str(one).rpartition(".")[2] in names)
        if isinstance(given, list)
        else ()
    )
    return tie.one(header, file, saved, np.asarray(leaf))


def _size(header: Mapping[str, Any]) -> int:
    return sum(t.nbytes // t.dtype.itemsize for t in header.values())


def check_base(
    folder: FilePath, config: Mapping[str, Any], model: Pretrained, *, allow_base: bool = False
) -> None:
    """Refuse a base or a task that the adapter is not for; no weight is read, but for the base's
    SHA-256.

    Args:
        folder: of the adapter.
        config: the content of its `adapter_config.json`.
        model: what it is to be loaded for.
        allow_base: whether the base may be another one; what differs is then told in a warning.

    Raises:
        AdapterError: listing what differs.
    """
    task = config.get("task_type")
    wanted = peft_config.TASK_TYPES[model.options.task]
    problems: list[str] = []
    if task is not None and task != wanted:
        problems.append(
            f"{folder / CONFIG}: task_type is {shorten(str(task))}, the model is loaded for"
            f" {wanted}"
        )
    extra = adapter_extra.read_extra(folder)
    if extra.get("pooling", model.options.pooling) != model.options.pooling:
        problems.append(
            f"{folder / EXTRA}: pooling is {extra['pooling']!r}, the model has"
            f" {model.options.pooling!r}"
        )
    tokens = extra.get("vocab_size", model.config.vocab_size)
    if tokens != model.config.vocab_size:
        problems.append(
            f"{folder / EXTRA}: vocab_size is {tokens}, the model has {model.config.vocab_size}"
            f" tokens; load it with vocab_size={tokens}"
        )
    if extra.get("base_sha256") and model.source:
        other = differences(
            extra["base_sha256"], extra.get("base_config"), model.source, model.options.task
        )
        why = (
            f"{folder / EXTRA}: the adapter was trained on another base"
            f" ({show(config.get('base_model_name_or_path'))}) than {model.source.name}: "
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
