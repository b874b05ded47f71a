"""`adapter_config.json` of Hugging Face PEFT: written from a method, and read back strictly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.options import parse
from jaxpeft.errors import AdapterError
from jaxpeft.methods import METHODS
from jaxpeft.methods.lora import LoRA

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "encoder": "FEATURE_EXTRACTION",
}
_LORA_OPTIONS = {
    "r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "bias": "bias",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
    "rank_pattern": "rank_pattern",
    "alpha_pattern": "alpha_pattern",
    "modules_to_save": "modules_to_save",
}
_HARMLESS = frozenset({
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "megatron_core", "qalora_group_size", "eva_config", "loftq_config", "init_lora_weights", "ensure_weight_tying",
    "runtime_config", "jaxpeft",
})  # fmt: skip
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga", "loftq")


def write(method: Method, task: str, base: str, revision: str | None, names: list[str]) -> dict[str, Any]:
    """Makes the content of `adapter_config.json`.

    Args:
        method: what was trained.
        task: of the model.
        base: name of the base model.
        revision: its hub commit.
        names: Hugging Face names of the modules that are saved whole, for `modules_to_save`.
    """
    common = {
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
    }
    if not isinstance(method, LoRA):
        return common | {"peft_type": method.name.upper(), "modules_to_save": names or None}
    values: dict[str, Any] = {peft: getattr(method, ours) for peft, ours in _LORA_OPTIONS.items()}
    for key in ("exclude_modules", "layers_pattern"):
        values[key] = values[key] or None
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
    return common | plain | {
        "peft_type": "LORA",
        "modules_to_save": names or None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }  # fmt: skip


def read(config: Mapping[str, Any], where: str, head: Mapping[str, Any]) -> Method:
    """Makes the method that `adapter_config.json` describes.

    Args:
        config: its content.
        where: the file's path, for messages.
        head: the top level of the model's tree, to tell which of `modules_to_save` are its head.

    Raises:
        AdapterError: another kind of adapter, or a setting that is not supported; every problem is named.
    """
    kind, saved = str(config.get("peft_type")), config.get("modules_to_save")
    if saved is not None and not (isinstance(saved, (str, list)) and all(isinstance(name, str) for name in saved)):
        raise AdapterError(f"{where}: modules_to_save: must be a list of names, is {saved!r}")
    plain = [name for name in METHODS if name != "lora"]
    if kind.lower() in plain:
        unknown = _unsupported({k: v for k, v in config.items() if k != "modules_to_save"}, kind.lower(), {})
        if unknown:
            raise AdapterError([f"{where}: {problem}" for problem in unknown])
        return METHODS[kind.lower()](modules_to_save=_modules_to_save(config, head))
    if kind != "LORA":
        known = ", ".join(["LORA", *(name.upper() for name in plain)])
        raise AdapterError(f"{where}: peft_type {kind!r} is not supported (supported: {known})")
    problems = _unsupported(config, "lora", _LORA_OPTIONS)
    values = {ours: _plain(config[peft]) for peft, ours in _LORA_OPTIONS.items() if config.get(peft) not in (None, "")}
    values["modules_to_save"] = _modules_to_save(config, head)
    if isinstance(values.get("layers_to_transform"), int):
        values["layers_to_transform"] = (values["layers_to_transform"],)
    if values.get("layers_to_transform") == ():
        del values["layers_to_transform"]
    if isinstance(values.get("layers_pattern"), str):
        values["layers_pattern"] = (values["layers_pattern"],)
    if "targets" not in values:
        problems.append("target_modules: is not set; name the modules that the adapter holds")
    # PEFT always writes both; its defaults in their place would be another adapter, without a word
    problems += [f"{peft}: is not set; take it from where the adapter was trained" for peft in ("r", "lora_alpha")
                 if _LORA_OPTIONS[peft] not in values]  # fmt: skip
    method, found = parse(LoRA, values, "lora")
    if problems or found or method is None:
        raise AdapterError([f"{where}: {problem}" for problem in (*problems, *found)])
    return method


def _plain(value: Any) -> Any:
    return (
        tuple(sorted(map(str, value))) if isinstance(value, set) else tuple(value) if isinstance(value, list) else value
    )


def _modules_to_save(config: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[str, ...]:
    """Drops the head's own names, which are always saved, and PEFT's stock names of heads that the model has not."""
    given = config.get("modules_to_save") or ()
    named: list[str] = [given] if isinstance(given, str) else list(given)
    return tuple(name for name in named if not paths.is_head((name,)) or (name in head and not paths.is_head((name,))))


def _unsupported(config: Mapping[str, Any], method: str, options: Mapping[str, str]) -> list[str]:
    problems: list[str] = []
    for key, value in config.items():
        if key in options or key in _HARMLESS or not value:
            continue
        problems.append(f"{key}: {value!r} is not supported by the {method} method; nothing was loaded")
    init = str(config.get("init_lora_weights", "")).lower()
    if init.startswith(_BASE_CHANGING_INITS):
        problems.append(
            f"init_lora_weights: {init!r} changed the base when training began; save it converted to plain LoRA "
            "(in PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )
    return problems
