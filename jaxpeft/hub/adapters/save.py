"""Saving adapter folders, in the file format of Hugging Face PEFT or of another library."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

import jaxpeft
from jaxpeft import atomic, kernels
from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.errors import AdapterError
from jaxpeft.hub.adapters import card as adapter_card
from jaxpeft.hub.adapters import checks, companions, expert_parameters, peft_config
from jaxpeft.hub.adapters import extra as adapter_extra
from jaxpeft.hub.adapters import tensors as adapter_tensors
from jaxpeft.hub.adapters.folder_layout import EXTRA, Content, FolderLayout
from jaxpeft.hub.adapters.layouts import CARD, LAYOUTS, PARTS
from jaxpeft.hub.adapters.settings import Settings, parse_settings
from jaxpeft.hub.adapters.tied_heads import tie_of
from jaxpeft.hub.base_identity import architecture, fingerprint
from jaxpeft.hub.weights.safetensors_writing import write_arrays
from jaxpeft.models.base import Pretrained, abstract_params

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CardFacts:
    """What a model card says besides the adapter: its training, and whether the folder contains a
    tokenizer.
    """

    training: adapter_card.Training | None
    has_tokenizer: bool = False


def save_adapter(
    path: str | FilePath,
    method: Method,
    params: Mapping[str, Any],
    model: Pretrained,
    *,
    labels: tuple[str, ...] = (),
    settings: Settings | None = None,
    tokenizer: Any = None,
    training: adapter_card.Training | None = None,
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
        training: how it was trained, for the model card (README.md).

    Raises:
        AdapterError: A leaf is not finite, or cannot be stored in the files; or the labels do not
            match the head.
    """
    folder = FilePath(path)
    if folder.exists() and not folder.is_dir():
        raise AdapterError(f"{folder}: is a file; choose a folder to save the adapter to")
    _check_tree(method, params, model)
    decided = _complete(settings or Settings(), model, labels)
    save = _save_one if companions.split(method) else _save_parts
    facts = CardFacts(training, tokenizer is not None)
    save(folder, method, params, model, decided, facts)
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
    facts: CardFacts,
) -> None:
    """Save the adapter of one method, and of the additional ones that its files can store."""
    folder.mkdir(parents=True, exist_ok=True)
    main, others = companions.split(method) or (method, ())
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
    tensors = {companions.rename(method, name): tensor for name, tensor in tensors.items()}
    config |= companions.write_options(
        main, {name: part for part in others for name in _site_names(part, params)}
    )
    config, tensors = expert_parameters.join(config, tensors, sites, model)
    if tied:
        config["ensure_weight_tying"] = True
    expert_parameters.warn_of_misread(config, model, sites)
    layout = LAYOUTS[main.peft.layout]
    _require_alone(folder, layout)
    files = layout.files(Content(config, tensors, sites, model, settings.labels))
    files |= {EXTRA: adapter_extra.extra_content(settings, files)}
    note = _pooling_note(layout, model)
    card = adapter_card.text(
        main, layout, config, settings, facts.training, note, facts.has_tokenizer
    )
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
    facts: CardFacts,
) -> None:
    """Save a mixed method as one folder per part, each loadable by `peft`, and their list."""
    names: list[str] = []
    for part in method.parts():
        name = part.name if part.name not in names else f"{part.name}_{len(names)}"
        names.append(name)
        own = dataclasses.replace(
            part, modules_to_save=(*method.modules_to_save, *part.modules_to_save)
        )
        _save_one(folder / name, own, params, model, settings, CardFacts(facts.training))
    content = {"jaxpeft_version": jaxpeft.__version__, "parts": names, "method": method.as_dict()}
    atomic.write_text(folder / PARTS, json.dumps(content, indent=2) + "\n")


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
    return f"{note}. Load it with `jaxpeft.load(..., pooling={how!r})` and `jaxpeft.load_adapter`."
