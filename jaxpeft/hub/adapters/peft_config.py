"""Writing a method as Hugging Face PEFT's `adapter_config.json`, and strictly parsing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft import methods
from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.options import parse
from jaxpeft.errors import AdapterError, show
from jaxpeft.hub.adapters import companions
from jaxpeft.methods import METHODS
from jaxpeft.methods.mixed import Mixed
from jaxpeft.methods.unsupported import UNSUPPORTED

TASK_TYPES = {
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "token_classification": "TOKEN_CLS",
    "encoder": "FEATURE_EXTRACTION",
}
COMMON = frozenset(
    {
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "runtime_config",
        "ensure_weight_tying",  # written for any method that trains a tied embedding
        "jaxpeft",
        "modules_to_save",
    }
)


def write(
    method: Method, task: str, base: str, revision: str | None, names: list[str]
) -> dict[str, Any]:
    """Return the content of `adapter_config.json`.

    Args:
        method: the method that was trained.
        task: task of the model.
        base: name of the base model.
        revision: its hub commit.
        names: Hugging Face names of the fully saved modules, for `modules_to_save`.
    """
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in method.peft.write_options(method).items()
    }
    return {
        "task_type": TASK_TYPES[task],
        "base_model_name_or_path": base,
        "revision": revision,
        "inference_mode": True,
        "peft_type": method.peft.type or method.name.upper(),
        **({"modules_to_save": names} if names else {}),
    } | values


def read(config: Mapping[str, Any], where: str, head: Mapping[str, Any]) -> Method:
    """Return the method that an `adapter_config.json` describes.

    Args:
        config: its content.
        where: the file's path, for messages.
        head: top level of the model's tree, which shows which of `modules_to_save` are its head.

    Raises:
        AdapterError: The kind of adapter or a setting is not supported; it lists every problem.
    """
    saved = config.get("modules_to_save")
    if saved is not None and not (
        isinstance(saved, (str, list)) and all(isinstance(name, str) for name in saved)
    ):
        raise AdapterError(f"{where}: modules_to_save: must be a list of names, is {show(saved)}")
    kind = method_of(config)
    if kind is None:
        known = ", ".join(
            dict.fromkeys(method.peft.type or name.upper() for name, method in METHODS.items())
        )
        found = str(config.get("peft_type"))
        why = f"; {UNSUPPORTED[found]}" if found in UNSUPPORTED else ""
        raise AdapterError(
            f"{where}: peft_type {show(found)} is not supported (supported: {known}){why}"
        )
    own = {key: value for key, value in config.items() if key not in COMMON - kind.peft.ignored}
    others, problems = companions.read_options(kind, own, "lm_head" not in head)
    if kind.peft.companion is not None and (others or problems):
        own.pop(kind.peft.companion.option)
    values, odd = kind.peft.read_options(kind, own)
    values = {key: _plain(value) for key, value in values.items()} | {
        "modules_to_save": _modules_to_save(config, head)
    }
    method, found = parse(kind, values, kind.name)
    problems += [*odd, *found]
    if method is not None and others and not problems:
        method, found = methods.read(
            {"name": Mixed.name, "methods": (method.as_dict(), *others)}, "adapter"
        )
        problems += found
    if problems or method is None:
        raise AdapterError([f"{where}: {problem}" for problem in problems])
    return method


def method_of(config: Mapping[str, Any]) -> type[Method] | None:
    """Return the first method that reads an `adapter_config.json`, or None."""
    return next((method for method in METHODS.values() if method.peft.reads(method, config)), None)


def _plain(value: Any) -> Any:
    return (
        tuple(sorted(map(str, value)))
        if isinstance(value, set)
        else tuple(value)
        if isinstance(value, list)
        else value
    )


def _modules_to_save(config: Mapping[str, Any], head: Mapping[str, Any]) -> tuple[str, ...]:
    """Return `modules_to_save` without heads: the model's head is always saved, and PEFT lists
    standard head names that the model may not have.
    """
    modules = config.get("modules_to_save") or ()
    names: list[str] = [modules] if isinstance(modules, str) else list(modules)
    return tuple(
        name
        for name in names
        if not paths.is_head((name,)) or (name in paths.PRETRAINED_HEADS and name not in head)
    )
