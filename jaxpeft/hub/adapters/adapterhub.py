"""Adapter folders of the `adapters` library (AdapterHub), as version 1.3 writes them with
`use_safetensors=True`.

    adapter_config.json     {"config": {options}, "name": NAME, "model_type": ..., "version": ...}
    adapter.safetensors     bert.encoder.layer.0.output.adapters.NAME.adapter_up.weight,
                            ...shared_parameters.NAME.phm_rule
    head_config.json        {"config": {its layers} or null, "model_class": ..., "num_labels": ...}
    model_head.safetensors  classifier.weight of a model class of transformers,
                            heads.NAME.1.weight of one of the library

The library stores adapters as modules next to the sub-layers; here they are leaves of the last
linear module of each sub-layer. Its options list the layers without adapters, and say whether
attention and feed-forward have adapters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

from jaxpeft.core import paths, targets
from jaxpeft.errors import AdapterError
from jaxpeft.hub.adapters.folder_layout import CONFIG, EXTRA, Content, FolderLayout
from jaxpeft.hub.adapters.peft_config import COMMON
from jaxpeft.hub.text_config import read_model_config
from jaxpeft.hub.weights.safetensors_files import read_header
from jaxpeft.json_files import read_json
from jaxpeft.models.base import Pretrained

HEAD_CONFIG, HEAD_WEIGHTS = "head_config.json", "model_head.safetensors"
VERSION, NAME = "adapters.1.3.0", "default"
_MODULES = {
    "attention.output.dense": "attention.output",
    "output.dense": "output",
    "attention.out_lin": "attention_adapters",
    "ffn.lin2": "output_adapters",
    "self_attn.o_proj": "attention_adapters",
    "mlp.down_proj": "output_adapters",
    "attn.Wo": "attention_adapters",
    "mlp.Wo": "output_adapters",
}
"""Maps the suffix of a site's name to the module that stores its adapters; the first match applies.
"""
_ATTENTION = ("attention.output.dense", "attention.out_lin", "self_attn.o_proj", "attn.Wo")
_FAMILIES = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "electra": "Electra",
    "modernbert": "ModernBert",
    "deberta-v2": "DebertaV2",
    "distilbert": "DistilBert",
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma": "Gemma",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "ministral3": "Ministral3",
    "glm4": "Glm4",
    "granite": "Granite",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
    "smollm3": "SmolLM3",
}
"""Stems of model classes by `model_type`; the library lacks some of them."""
_CLASSES = {
    "sequence_classification": "ForSequenceClassification",
    "token_classification": "ForTokenClassification",
    "causal_lm": "ForCausalLM",
    "encoder": "Model",
}
_HEAD_TYPES = {
    "sequence_classification": ("classification", "multilabel_classification"),
    "token_classification": ("tagging",),
}
_OLD_NAMES = {"gelu": "gelu_new", "gelu_orig": "gelu"}  # in files without a version
_log = logging.getLogger(__name__)


class AdapterHub(FolderLayout):
    """The layout of the `adapters` library."""

    library = "the adapters library (AdapterHub)"
    name = "adapters"
    weights = "adapter.safetensors"
    pickle = "pytorch_adapter.bin"
    fix = (
        "save it again in the adapters library, model.save_adapter(folder, name,"
        " use_safetensors=True)"
    )
    usage = (
        "Load it there with `model.load_adapter(folder, use_safetensors=True, set_active=True)`.\n"
    )

    def files(self, content: Content) -> dict[str, Mapping[str, Any]]:
        """Return the content of each file by its name.

        Raises:
            AdapterError: Sites are adapted that the library cannot adapt.
        """
        model, kind = content.model, _model_type(content.model) or "llama"
        common = {
            "model_type": kind,
            "hidden_size": model.config.hidden_size,
            "model_class": _FAMILIES[kind] + _CLASSES[model.options.task],
            "model_name": content.config["base_model_name_or_path"],
            "version": VERSION,
        }
        where = _where(content.sites, model.config.num_hidden_layers)
        own = {key: value for key, value in content.config.items() if key not in COMMON}
        heads = {
            name: t for name, t in content.tensors.items() if paths.is_head(tuple(name.split(".")))
        }
        rest = {
            _library_name(name, content.sites): t
            for name, t in content.tensors.items()
            if name not in heads
        }
        files: dict[str, Mapping[str, Any]] = {
            CONFIG: {**common, "name": NAME, "config": own | where},
            self.weights: rest,
        }
        if heads:
            labels = content.labels or [f"LABEL_{i}" for i in range(model.options.num_labels or 0)]
            numbers = {label: i for i, label in enumerate(labels)}
            files[HEAD_CONFIG] = {
                **common,
                "name": None,
                "config": None,
                "num_labels": len(labels),
                "label2id": numbers,
            }
            files[HEAD_WEIGHTS] = heads
        return files

    def read(
        self, folder: Path, model: Pretrained, params: Mapping[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a folder. If it has no prediction head, the model keeps its own.

        Raises:
            AdapterError: It is a different kind of adapter, or for a different kind of model.
            WeightsError: A file is missing or broken.
        """
        config = read_json(folder / CONFIG)
        kind, section = _model_type(model), config.get("config")
        problems: list[str] = []
        if not isinstance(section, Mapping):
            problems.append(f"config: must be a section with the adapter's options, is {section!r}")
        elif section.get("architecture") is not None:
            problems.append(
                f"architecture: {section['architecture']!r} is not supported; only this library's"
                " bottleneck adapters are"
            )
        if kind and config.get("model_type") not in (None, kind):
            problems.append(
                f"model_type: the adapter is for {config['model_type']!r}, the model is {kind!r}"
            )
        if problems:
            raise AdapterError([f"{folder / CONFIG}: {problem}" for problem in problems])
        options = _options(
            cast(Mapping[str, Any], section), "version" in config, model.config.num_hidden_layers
        )
        tensors = _local_name(read_header(folder / self.weights), params)
        return {"base_model_name_or_path": config.get("model_name"), **options}, tensors | _head(
            folder, model, params
        )


def _model_type(model: Pretrained) -> str | None:
    """Return the `model_type` of a model's `config.json`; None for a decoder without a file."""
    kind = getattr(model.config, "kind", None)
    if kind is None and model.source is not None:
        kind = read_model_config(model.source.folder).get("model_type")
    return kind


# ------------------------------------------------------------------------------------------ writing


def _end(site: str) -> str | None:
    return next((end for end in _MODULES if site == end or site.endswith(f".{end}")), None)


def _where(sites: Sequence[str], layers: int) -> dict[str, Any]:
    """Return the options that select the sub-layers and layers with adapters.

    Raises:
        AdapterError: The library's options cannot express these sites.
    """
    others = [site for site in sites if _end(site) is None]
    if others:
        raise AdapterError(
            f"{others[0]}: the adapters library supports adapters only at the end of a sub-layer"
            f" ({', '.join(_MODULES)}); this adapter cannot be saved in its format"
        )
    numbers: dict[bool, set[int]] = {True: set(), False: set()}
    for site in sites:
        found = re.search(r"\.(\d+)\.", site)
        numbers[_end(site) in _ATTENTION].add(int(found[1]) if found else -1)
    attention, output = numbers[True], numbers[False]
    if attention and output and attention != output:
        raise AdapterError(
            f"attention has adapters in the layers {sorted(attention)}, feed-forward in"
            f" {sorted(output)}; the adapters library has one list of layers for both: adapt the"
            " same layers"
        )
    skipped = sorted(set(range(layers)) - (attention | output))
    return {"mh_adapter": bool(attention), "output_adapter": bool(output), "leave_out": skipped}


def _library_name(name: str, sites: Sequence[str]) -> str:
    """Return the library's name for the tensor of a site, or for one at the root."""
    site = next((site for site in sites if name.startswith(f"{site}.")), None)
    if site is None:
        backbone = sites[0].split(".")[0]
        return f"{'' if backbone in _STACKS else backbone + '.'}shared_parameters.{NAME}.{name}"
    end = _end(site) or ""
    return f"{site.removesuffix(end)}{_MODULES[end]}.adapters.{NAME}{name.removeprefix(site)}"


# ------------------------------------------------------------------------------------------ reading

_STACKS = ("encoder", "transformer", "layers")


def _options(section: Mapping[str, Any], has_version: bool, layers: int) -> dict[str, Any]:
    """Return the options as a method reads them, with the list of layers that have adapters."""
    options = {
        key: value for key, value in section.items() if key not in ("leave_out", "architecture")
    }
    act = str(options.get("non_linearity", "")).lower().replace("leakyrelu", "leaky_relu")
    if act:
        options["non_linearity"] = act if has_version else _OLD_NAMES.get(act, act)
    skipped = section.get("leave_out") or []
    if skipped:
        options["layers_to_transform"] = [i for i in range(layers) if i not in skipped]
    return options | {"peft_type": AdapterHub.name, "target_modules": "default"}


def _local_name(header: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors by site name, whether or not their names have the backbone's prefix."""
    sites: dict[str, str] = {}
    for site in (name for found in targets.find_sites(params) for name in found.names):
        end = _end(site)
        if end is not None:
            sites[_without_backbone(site.removesuffix(end) + _MODULES[end])] = site
    named: dict[str, Any] = {}
    for name, tensor in header.items():
        found = re.fullmatch(r"(.*)\.adapters\.[^.]+\.(.*)", name)
        site = sites.get(_without_backbone(found[1])) if found else None
        shared = re.fullmatch(r"(?:.*\.)?shared_parameters\.[^.]+\.(.*)", name)
        named[f"{site}.{found[2]}" if found and site else shared[1] if shared else name] = tensor
    return named


def _without_backbone(name: str) -> str:
    """Return a module's name without the backbone's prefix."""
    return re.sub(rf"^(?!(?:{'|'.join(_STACKS)})\.)[^.]+\.", "", name)


@dataclass(frozen=True)
class TensorView:
    """A tensor of the loaded model, used instead of one from a file."""

    value: np.ndarray[Any, Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Row-major shape."""
        return self.value.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy dtype."""
        return self.value.dtype

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.value.nbytes

    def read(self) -> np.ndarray[Any, Any]:
        """Return the tensor."""
        return self.value


def _head(folder: Path, model: Pretrained, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of the prediction head by the model's names.

    Raises:
        AdapterError: The head does not fit the model.
    """
    own = {
        paths.hf_names(path)[0]: (path, leaf)
        for path, leaf in paths.walk(params)
        if paths.is_head(path)
    }
    saved = (folder / HEAD_WEIGHTS).is_file()
    if not own:
        if saved and model.options.task == "causal_lm":
            _require_same_head(folder / HEAD_WEIGHTS, params)
        return {}
    if not saved:
        _log.warning("%s: has no %s; the model's own head is kept", folder, HEAD_WEIGHTS)
        return {name: TensorView(torch_layout(path, leaf)) for name, (path, leaf) in own.items()}
    header, config = read_header(folder / HEAD_WEIGHTS), read_json(folder / HEAD_CONFIG)
    found = _head_problems(config, model, own, saved_here=(folder / EXTRA).is_file())
    if found:
        raise AdapterError([f"{folder / HEAD_CONFIG}: {problem}" for problem in found])
    parts = {name: re.fullmatch(r"heads\.[^.]+\.(\d+)\.(.*)", name) for name in header}
    numbers = sorted({int(part[1]) for part in parts.values() if part})
    modules = dict(zip(numbers, _head_modules(own), strict=False))
    return {
        f"{modules[int(part[1])]}.{part[2]}" if part else name: header[name]
        for name, part in parts.items()
    }


def torch_layout(path: paths.Path, leaf: Any) -> np.ndarray[Any, Any]:
    """Return a leaf in torch's layout."""
    return np.asarray(leaf).T if path[-1] == "kernel" else np.asarray(leaf)


def _require_same_head(file: Path, params: Mapping[str, Any]) -> None:
    """Raise an error if a saved language-model head differs from the base's.

    The library saves the head with every adapter, and may have trained it.
    """
    for path, leaf in paths.walk(params):
        if path == ("lm_head", "kernel") or ("lm_head" not in params and path[-1] == "embedding"):
            base = torch_layout(path, leaf)
            for name, tensor in read_header(file).items():
                if not np.array_equal(tensor.read().astype(base.dtype), base):
                    raise AdapterError(
                        f"{file}: {name} differs from the base's: it was trained with the adapter,"
                        " which is not supported; save the base with that head, and the adapter"
                        " with with_head=False"
                    )


def _head_modules(own: Mapping[str, Any]) -> list[str]:
    """Return the linear modules of the model's head in the order in which they are applied."""
    return sorted(
        {name.rpartition(".")[0] for name in own},
        key=lambda name: (name.split(".")[0] in ("classifier", "score"), name),
    )


def _head_problems(
    config: Mapping[str, Any], model: Pretrained, own: Mapping[str, Any], *, saved_here: bool
) -> list[str]:
    """List the differences between a prediction head and the model's.

    The pooling of a head that jaxpeft saved is checked with `jaxpeft.json` instead.
    """
    task, head, usual = model.options.task, config.get("config"), model.config.own_pooling
    if isinstance(head, Mapping):
        found, reads = _layer_problems(head, model, _head_modules(own)), usual
        if usual != "last":
            reads = "pooler" if head.get("use_pooler") else "cls"
    else:  # the head of a transformers model class
        name, reads = str(config.get("model_class")), usual
        kind = _CLASSES[task]
        found = (
            []
            if name.endswith(kind)
            else [f"model_class: {name!r} has a different kind of head than ...{kind}"]
        )
    known = saved_here and not isinstance(head, Mapping)
    if task == "sequence_classification" and not known and reads != model.options.pooling:
        found.append(
            f"the head uses pooling {reads!r}, the model {model.options.pooling!r}; load the model"
            f" with pooling={reads!r}"
        )
    return found


def _layer_problems(
    head: Mapping[str, Any], model: Pretrained, modules: Sequence[str]
) -> list[str]:
    """List the differences between the layers of the library's head and the model's."""
    found: list[str] = []
    task = model.options.task
    if head.get("head_type") not in _HEAD_TYPES[task]:
        found.append(f"head_type: {head.get('head_type')!r} is not a head for {task}")
    if head.get("layers") != len(modules):
        found.append(
            f"layers: the head has {head.get('layers')}, the model's has {len(modules)}"
            f" ({', '.join(modules)})"
        )
    act = getattr(model.config, "head_act", None)
    if len(modules) > 1 and head.get("activation_function") != act:
        found.append(
            f"activation_function: is {head.get('activation_function')!r}, the model's head has"
            f" {act!r}"
        )
    return found
