"""Read config files and command-line overrides, check them, and report all problems at once."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import json
import logging
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from jaxpeft import methods
from jaxpeft.config import plain_files
from jaxpeft.config.data_config import ESCAPED
from jaxpeft.config.literals import read_value, unescape
from jaxpeft.config.schema import Config, as_dict
from jaxpeft.core.method import Method
from jaxpeft.core.option_docs import default_of
from jaxpeft.core.options import ALIASES, Reader, hints_of, parse, resolve_aliases, unknown_option
from jaxpeft.errors import ConfigError, nearest, shorten, show
from jaxpeft.methods import METHODS

_log = logging.getLogger(__name__)
_DEEPEST = 2
"""Maximum number of names in a dotted option: section and option."""


def defaults(method: str = "lora") -> ml_collections.ConfigDict:
    """Return the default config, to be changed by a config file's `get_config()`.

    Args:
        method: name of the fine-tuning method, which determines the options in `config.method`.

    Raises:
        ConfigError: the method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(
            f"method.name: {show(method)} is not a method{nearest(method, METHODS)} (known:"
            f" {', '.join(METHODS)})"
        )
    plain = as_dict(Config()) | {"method": _default_options(METHODS[method])}
    # wrong types and names are reported with all other problems of the file, not at their line
    return ml_collections.ConfigDict(plain, type_safe=False)


def _default_options(cls: type[Method]) -> dict[str, Any]:
    """Return the defaults of a method's options, those included that a config must set."""
    fields = {field.name: default_of(field) for field in dataclasses.fields(cls) if field.init}
    return json.loads(json.dumps({"name": cls.name, **fields}))


def load(path: str | Path, overrides: Sequence[tuple[str, str]] = ()) -> Config:
    """Read and check a config file.

    Args:
        path: a Python file that defines `get_config()`, which is executed, so it must be trusted;
            or a YAML or JSON file with the options that differ from the defaults.
        overrides: `(dotted option, text)` pairs from the command line.

    Raises:
        ConfigError: lists every unknown option, wrong type, value out of range and incompatible
            pair.
    """
    values = read_file(Path(path))
    problems = _resolve_aliases(values)
    for option, text in _methods_first(overrides):
        problems += _override(values, option, text)
    config, found = parse_config(values)
    if problems or found or config is None:
        raise ConfigError([*problems, *found])
    return config


def _resolve_aliases(values: dict[str, Any]) -> list[str]:
    """Replace aliases of the method's options by their names, so that the command line can override
    them; return the problems.
    """
    method = values.get("method")
    if not isinstance(method, Mapping):
        return []  # reported with the file's other problems
    cls = METHODS.get(str(method.get("name", "lora")), Method)
    values["method"], problems = resolve_aliases(cls, method, "config.method")
    return problems


def parse_config(values: Mapping[str, Any]) -> tuple[Config | None, list[str]]:
    """Make a `Config` from plain values, as returned by `as_dict`; the method's name determines how
    its section is read.
    """
    section = values.get("method", {})
    if not isinstance(section, Mapping):
        return None, [f"config.method: must be a section with options, is {show(section)}"]
    rest = {key: value for key, value in values.items() if key != "method"}
    method, problems = methods.read(typing.cast(Mapping[str, Any], section), "config.method")
    if method and "compare" in rest:
        rest["compare"] = _with_methods(rest["compare"], typing.cast(Mapping[str, Any], section))
    config, found = parse(Config, {**rest, "method": method} if method else rest, "config")
    return (None, [*problems, *found]) if problems or found else (config, [])


def _with_methods(compare: Any, method: Mapping[str, Any]) -> Any:
    """Return the section of a comparison, with the config's method in candidates that set none."""
    candidates = compare.get("candidates") if isinstance(compare, Mapping) else None
    if not isinstance(candidates, (list, tuple)):
        return compare
    found = [{"method": method, **one} if isinstance(one, Mapping) else one for one in candidates]
    return {**compare, "candidates": found}


def read_file(path: Path) -> dict[str, Any]:
    """Read a config file as nested plain dicts; Python files are executed.

    Raises:
        ConfigError: the file is missing or has another type; a Python file fails, or has no
            `get_config()` that returns a ConfigDict; a YAML or JSON file cannot be read, sets an
            option twice, or has no sections.
    """
    if why := _missing_reason(path):
        raise ConfigError(f"--config {shorten(str(path), 200)}: {why}")
    if path.suffix in plain_files.READERS:
        return _with_defaults(plain_files.read(path))
    return _execute(path)


def _with_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """Merge a plain file's values into the defaults of its method."""
    method = values.get("method")
    name = method.get("name", "lora") if isinstance(method, Mapping) else "lora"
    # an invalid name is reported with the file's other problems
    found = defaults(name if isinstance(name, str) and name in METHODS else "lora").to_dict()
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and dataclasses.is_dataclass(
            hints_of(Config).get(key)
        )
        found[key] = {**found[key], **value} if is_section else value
    return found


def _execute(path: Path) -> dict[str, Any]:
    """Execute a Python config file."""
    spec = importlib.util.spec_from_file_location("jaxpeft_user_config", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--config {path}: must be a file NAME.py, NAME.yaml or NAME.json")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        returned: object = module.get_config() if hasattr(module, "get_config") else None
        config = returned.to_dict() if isinstance(returned, ml_collections.ConfigDict) else returned
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"{path}{_line_of(error, path)}: {type(error).__name__}:"
            f" {shorten(' '.join(str(error).split()), 400)}"
        ) from error
    if not hasattr(module, "get_config"):
        raise ConfigError(f"{path}: defines no get_config(); return the config from it")
    if not isinstance(config, dict):
        raise ConfigError(
            f"{path}: get_config() must return a ConfigDict, returns a {type(config).__name__}"
        )
    return typing.cast(dict[str, Any], config)


def _missing_reason(path: Path) -> str | None:
    """Return why a path is not a file, with similar files; None if it is one."""
    try:
        if path.is_file():
            return None
        if path.is_dir():
            return (
                f"a folder; give one of its files: {', '.join(p.name for p in _configs_in(path))}"
            )
        files = [str(p) for p in _configs_in(path.parent)] if path.parent.is_dir() else []
    except OSError as error:  # a name that is too long, or an unreadable folder
        return f"cannot be read ({error.strerror})"
    near = difflib.get_close_matches(str(path), files, n=3, cutoff=0.3)
    return "no such file" + (f"; did you mean {' or '.join(near)}?" if near else "")


def _configs_in(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in (".py", *plain_files.READERS))


def _line_of(error: BaseException, path: Path) -> str:
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.lineno else ""
    lines = []
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    return f":{lines[-1]}" if lines else ""


def _methods_first(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(overrides, key=lambda pair: pair[0] != "method.name")


def _override(values: dict[str, Any], option: str, text: str) -> list[str]:
    """Set one option from the command line; return the problem, if any."""
    method = values.setdefault("method", {"name": "lora"})
    if option == "method":
        return ["--config.method: is a section; set --config.method.name=NAME"]
    if not isinstance(method, dict):
        return []  # reported with the file's other problems
    if option == "method.name" and text != method.get("name"):
        dropped = ", ".join(key for key in method if key != "name")
        _log.info(
            "--config.method.name=%s: ignoring the file's options for its own method (%s)",
            text,
            dropped,
        )
        values["method"] = {"name": text}
        return []
    option, key = _split_key(_own_name(option, values), values)
    *sections, last = option.split(".")
    node: Any = values
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    hint = _hint(option, values)
    if isinstance(node, dict) and hint is not None and key:
        mapping = node.get(last) or {}
        if not isinstance(mapping, Mapping):
            return []  # reported with the file's other problems
        node[last] = {**mapping, key: read_value(text, typing.get_args(hint)[1])}
        return []
    if not isinstance(node, dict) or hint is None:
        return [f"--config.{shorten(option)}: {unknown_option(option, _all_options(values))}"]
    if not isinstance(node.get(last), dict) or typing.get_origin(hint) is dict:
        node[last] = read_value(text, hint, _reader(option, values))
        if option in ESCAPED and node[last] == text:
            node[last] = unescape(text)
        return []
    return [f"--config.{option}: is a section; set one of its options: {', '.join(node[last])}"]


def _own_name(option: str, values: Mapping[str, Any]) -> str:
    """Return a dotted option with an alias replaced by the option's name."""
    section, _, last = option.rpartition(".")
    own = f"{section}.{ALIASES.get(last, last)}"
    return own if last in ALIASES and _hint(own, values) is not None else option


def _split_key(option: str, values: Mapping[str, Any]) -> tuple[str, str]:
    """Split `method.rank_pattern.q_proj` into mapping option and key; other options have no key."""
    parts = option.split(".")
    for n in range(1, min(len(parts), _DEEPEST + 1)):
        if typing.get_origin(_hint(".".join(parts[:n]), values)) is dict:
            return ".".join(parts[:n]), ".".join(parts[n:])
    return option, ""


def _hint(option: str, values: Mapping[str, Any]) -> Any:
    """Return the annotated type of a dotted option, or None if the option does not exist."""
    cls: Any = Config
    for key in option.split("."):
        hints = hints_of(cls) if dataclasses.is_dataclass(cls) else {}
        if key == "name" and isinstance(cls, type) and issubclass(cls, Method):
            return str
        if key not in hints:
            return None
        section = values.get("method")
        name = section.get("name", "lora") if isinstance(section, Mapping) else "lora"
        cls = METHODS.get(str(name), Method) if hints[key] is Method else hints[key]
    return cls


def _reader(option: str, values: Mapping[str, Any]) -> Reader | None:
    """Return the custom reader of an option, or None."""
    section, _, name = option.rpartition(".")
    cls = _hint(section, values) if section else Config
    fields = (
        {field.name: field for field in dataclasses.fields(cls)}
        if dataclasses.is_dataclass(cls)
        else {}
    )
    return fields[name].metadata.get("read") if name in fields else None


def _all_options(values: Mapping[str, Any]) -> list[str]:
    """Return all dotted options, including those of the configured method."""
    found: list[str] = []
    for field in dataclasses.fields(Config):
        hint = _hint(field.name, values)
        inner = dataclasses.fields(hint) if dataclasses.is_dataclass(hint) else ()
        found += [f"{field.name}.{one.name}" for one in inner if one.init] or [field.name]
    return found
