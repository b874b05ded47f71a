"""Options: dataclass fields with a description and bounds, and their validation.

The config file, the command line and the methods' hyperparameters all use this module. It does not
import JAX.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

from jaxpeft.errors import ConfigError, nearest, shorten, show

T = TypeVar("T")
Reader = Callable[[Mapping[str, Any], str], tuple[Any, list[str]]]
"""Makes an instance from plain values and their name in messages: returns `(instance, [])`, or
`(None, problems)`.
"""
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "above": (lambda value, bound: value > bound, "above"),
    "at_least": (lambda value, bound: value >= bound, "at least"),
    "below": (lambda value, bound: value < bound, "below"),
    "at_most": (lambda value, bound: value <= bound, "at most"),
}
_REFUSED = {
    "trust_remote_code": (
        "refused: no code of a model, a data set or an adapter is ever run; remove it"
    ),
    "baselines": (
        "is removed: a run trains one method; list the methods instead, as in"
        " config.compare.candidates = ({'method': {'name': 'head'}}, {}), where {} is"
        " config.method, and run `python -m jaxpeft.compare`"
    ),
    "baseline_learning_rates": (
        "is removed; set the learning_rate of each of config.compare.candidates"
    ),
}
"""Options that do not exist on purpose, with the reason."""
_ELSEWHERE = {
    "lr": "learning_rate",
    "lr_scheduler": "schedule",
    "lr_scheduler_type": "schedule",
    "scheduler": "schedule",
    "wd": "weight_decay",
    "beta1": "b1",
    "beta2": "b2",
    "adam_beta1": "b1",
    "adam_beta2": "b2",
    "adam_epsilon": "eps",
    "max_grad_norm": "clip_norm",
    "grad_clip": "clip_norm",
    "optim": "name",
    "epoch": "epochs",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "num_steps": "steps",
    "bs": "batch_size",
    "train_batch_size": "batch_size",
    "per_device_train_batch_size": "batch_size",
    "grad_accum": "accumulation",
    "gradient_accumulation_steps": "accumulation",
    "gradient_checkpointing": "remat",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "use_rslora": "rslora",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "seq_len": "max_length",
    "model_name": "path",
    "model_name_or_path": "path",
    "attn_implementation": "attention",
    "load_in_4bit": "quant",
    "num_workers": "workers",
    "dataloader_num_workers": "workers",
    "train_file": "train",
    "dataset": "train",
    "save_steps": "every_steps",
    "eval_steps": "every_steps",
    "logging_steps": "every_steps",
    "save_total_limit": "keep",
    "early_stopping_patience": "patience",
}
"""Names of options in other libraries, for suggestions in error messages."""
ALIASES: Mapping[str, str] = {"target_modules": "targets", "exclude_modules": "exclude"}
"""PEFT's names of options, accepted as aliases."""
_LARGEST_INT = 2**31 - 1
"""The default upper bound of integer options."""
_MOST_SHOWN = 5


def option(
    default: Any,
    doc: str,
    *,
    read: Reader | None = None,
    also: tuple[str, ...] = (),
    **bounds: float,
) -> Any:
    """Declare one option.

    Args:
        default: its default; a dict is copied for each instance, a dataclass type is instantiated.
        doc: one-line description, with the unit.
        read: makes an instance of a section that has several possible types, such as methods;
            None to use `parse`.
        also: further names of its command-line flag.
        **bounds: any of `above`, `at_least`, `below`, `at_most`.
    """
    metadata = {"doc": doc, **({"read": read} if read else {}), "also": also, **bounds}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def unknown_option(key: str, known: Iterable[str]) -> str:
    """Return the error message for an unknown option, with suggestions or the reason.

    Args:
        key: the unknown name, with or without its section.
        known: the existing options.
    """
    last, names = key.rpartition(".")[2], list(known)
    if why := _REFUSED.get(last):
        return why
    ours = [name for name in names if name.rpartition(".")[2] == _ELSEWHERE.get(last)]
    section = [name for name in ours if name.rpartition(".")[0] == key.rpartition(".")[0]] or ours
    return (
        f"no such option; did you mean {' or '.join(map(repr, section))}?"
        if section
        else f"no such option{nearest(key, names)}"
    )


def changed_options(instance: Any) -> dict[str, Any]:
    """Return the options of an instance that differ from their defaults, by name."""
    return {
        field.name: value
        for field in dataclasses.fields(instance)
        if (value := getattr(instance, field.name)) != _default_of(field)
    }


def _default_of(field: dataclasses.Field[Any]) -> Any:
    factory = field.default_factory
    return field.default if factory is dataclasses.MISSING else factory()


@functools.cache
def hints_of(cls: type[Any]) -> Mapping[str, Any]:
    """Return the types of the fields of a dataclass, without `InitVar` pseudo-fields."""
    hints = typing.get_type_hints(cls)
    return {name: hint for name, hint in hints.items() if not isinstance(hint, dataclasses.InitVar)}


def resolve_aliases(
    cls: type[Any], values: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Replace aliases in a mapping of options by the options' own names.

    Both names may be present if the own name has its default value, as in a config file.

    Args:
        cls: the dataclass of options.
        values: values by option name.
        where: name of the mapping in messages.

    Returns:
        `(values, problems)`, with a problem for each option that has two different values.
    """
    defaults = {f.name: f.default for f in dataclasses.fields(cls) if f.init}
    found, problems = dict(values), list[str]()
    for alias, name in ALIASES.items():
        if alias not in values or name not in defaults:
            continue
        value, own = found.pop(alias), found.get(name, defaults[name])
        if _as_tuple(own) not in (_as_tuple(defaults[name]), _as_tuple(value)):
            problems.append(
                f"{where}.{alias}: is an alias of {name}, which is {show(own)}; set only one of"
                " them"
            )
        found[name] = value
    return found, problems


def take_aliases(instance: Any, **aliases: Any) -> None:
    """Set options of an instance from aliases that are not None.

    Raises:
        ConfigError: An option has different values under its two names.
    """
    values = {alias: value for alias, value in aliases.items() if value is not None}
    own = {name: getattr(instance, name) for name in map(ALIASES.__getitem__, values)}
    found, problems = resolve_aliases(type(instance), own | values, type(instance).__name__)
    if problems:
        raise ConfigError(problems)
    for name, value in found.items():
        object.__setattr__(instance, name, value)


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def parse(cls: type[T], values: Mapping[str, Any], where: str) -> tuple[T | None, list[str]]:
    """Make a `cls` from plain values, and report all problems at once.

    Args:
        cls: a frozen dataclass of options; its method `problems() -> list[str]`, if any, checks
            several fields together.
        values: plain values by option name, with nested mappings for nested dataclasses.
        where: name of the mapping in messages, such as `config.method`.

    Returns:
        `(instance, [])`, or `(None, problems)`.
    """
    hints, fields = (
        hints_of(cls),
        {f.name: f for f in dataclasses.fields(typing.cast(Any, cls)) if f.init},
    )
    values, found = resolve_aliases(cls, values, where)
    taken: dict[str, Any] = {}
    for name, value in values.items():
        key = str(name)
        if key not in fields:
            known = ", ".join(sorted(fields))
            found.append(f"{where}.{shorten(key)}: {unknown_option(key, fields)} (known: {known})")
            continue
        taken[key], problems = convert(
            value, hints[key], f"{where}.{key}", fields[key].metadata.get("read")
        )
        found += problems or _out_of_bounds(taken[key], fields[key].metadata, f"{where}.{key}")
    wrong = [
        problem.removeprefix(f"{where}.").partition(":")[0].split(".")[0].split("[")[0]
        for problem in found
    ]
    try:
        instance = cls(**{key: value for key, value in taken.items() if key not in wrong})
    except ConfigError as error:  # methods validate themselves on creation
        across = [problem.partition(".")[2] for problem in error.problems]
        instance = None
    else:
        check: Callable[[], list[str]] | None = getattr(instance, "problems", None)
        across = check() if check else []
    # skip problems that only follow from an option whose value is already reported as invalid
    found += [
        f"{where}.{p}"
        for p in across
        if not any(re.search(rf"\b{re.escape(name)}\b", p) for name in wrong)
    ]
    return (None, found) if found else (instance, [])


def settle(instance: Any, where: str) -> list[str]:
    """Convert the values of an instance created directly, such as `LoRA(targets=["query"])`.

    Returns:
        The problems with its values.
    """
    hints = hints_of(type(instance))
    found: list[str] = []
    for field in dataclasses.fields(instance):
        name = f"{where}.{field.name}"
        value, problems = convert(
            getattr(instance, field.name), hints[field.name], name, field.metadata.get("read")
        )
        found += problems or _out_of_bounds(value, field.metadata, name)
        object.__setattr__(instance, field.name, value)
    return found or [f"{where}.{problem}" for problem in instance.problems()]


def bounds_of(number: type[Any], metadata: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the bounds of an option's numbers.

    Args:
        number: `int` or `float`; integers have a default upper bound.
        metadata: metadata of the option's field.
    """
    default = {"at_most": _LARGEST_INT} if number is int and "below" not in metadata else {}
    return default | {name: metadata[name] for name in _BOUNDS if name in metadata}


def _out_of_bounds(value: Any, metadata: Mapping[str, Any], where: str) -> list[str]:
    items = (
        value
        if isinstance(value, tuple)
        else value.values()
        if isinstance(value, dict)
        else (value,)
    )
    found: list[str] = []
    for item in items:
        if isinstance(item, bool) or not isinstance(item, (int, float)):
            continue
        bounds = bounds_of(type(item), metadata)
        if isinstance(item, float) and not math.isfinite(item):
            found.append(f"{where}: must be a finite number, is {show(item)}")
            continue
        for name, (holds, words) in _BOUNDS.items():
            if name in bounds and not holds(item, bounds[name]):
                found.append(f"{where}: must be {words} {bounds[name]}, is {show(item)}")
    return _first(found, where)


def _first(problems: list[str], where: str) -> list[str]:
    """Return the first problems of one option, and the number of others."""
    more = len(problems) - _MOST_SHOWN
    return (
        problems
        if more <= 0
        else [*problems[:_MOST_SHOWN], f"{where}: {more} more of its values are invalid"]
    )


def convert(value: Any, hint: Any, where: str, read: Reader | None = None) -> tuple[Any, list[str]]:
    """Return the value converted to the annotated type, or the value itself and its problems."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _convert_union(value, hint, where)
    if origin is Literal:
        if type(value) in {type(choice) for choice in get_args(hint)} and value in get_args(hint):
            return value, []
        choices = ", ".join(map(repr, get_args(hint)))
        text = value if isinstance(value, str) else show(value)
        suggestion = nearest(text, map(str, get_args(hint)))
        return value, [f"{where}: must be one of {choices}, is {show(value)}{suggestion}"]
    if origin is tuple:
        return _convert_tuple(value, get_args(hint)[0], where, read)
    if origin is dict:
        return _convert_dict(value, get_args(hint)[1], where)
    if dataclasses.is_dataclass(hint):
        return _convert_dataclass(value, hint, where, read)
    return _convert_scalar(value, hint, where)


def _convert_union(value: Any, hint: Any, where: str) -> tuple[Any, list[str]]:
    attempts = [(choice, *convert(value, choice, where)) for choice in get_args(hint)]
    for _, converted, problems in attempts:
        if not problems:
            return converted, []
    for choice, _, problems in attempts:
        if not problems[0].startswith(f"{where}: must be {_words(choice)}, is"):
            return value, problems  # the right type, but an invalid value
    return value, [f"{where}: must be {_words(hint)}, is {show(value)} ({type(value).__name__})"]


def _convert_tuple(
    value: Any, item_hint: Any, where: str, read: Reader | None
) -> tuple[Any, list[str]]:
    if isinstance(value, (set, frozenset)):
        value = sorted(typing.cast(set[Any], value), key=str)
    if not isinstance(value, (list, tuple)):
        return value, [
            (
                f"{where}: must be a list of {_words(item_hint, plural=True)}, is {show(value)}"
                f" ({type(value).__name__})"
            )
        ]
    pairs = [
        convert(item, item_hint, f"{where}[{i}]", read)
        for i, item in enumerate(typing.cast(list[Any], value))
    ]
    return tuple(item for item, _ in pairs), _first(
        [problem for _, problems in pairs for problem in problems], where
    )


def _convert_dict(value: Any, item_hint: Any, where: str) -> tuple[Any, list[str]]:
    if not isinstance(value, Mapping):
        return value, [f"{where}: must be a mapping, is {show(value)} ({type(value).__name__})"]
    items = typing.cast(Mapping[str, Any], value)
    pairs = {
        str(key): convert(item, item_hint, f"{where}[{show(key)}]") for key, item in items.items()
    }
    wrong = [problem for key in pairs for problem in _text_fault(key, f"{where}[{show(key)}]")]
    wrong += [problem for _, problems in pairs.values() for problem in problems]
    return {key: item for key, (item, _) in pairs.items()}, _first(wrong, where)


def _convert_dataclass(
    value: Any, hint: Any, where: str, read: Reader | None
) -> tuple[Any, list[str]]:
    if isinstance(value, hint):
        return value, []
    if read is not None and isinstance(value, Mapping):
        return read(typing.cast(Mapping[str, Any], value), where)
    if not isinstance(value, Mapping):
        return value, [
            f"{where}: must be a section with options, is {show(value)} ({type(value).__name__})"
        ]
    return parse(hint, typing.cast(Mapping[str, Any], value), where)


def _convert_scalar(value: Any, hint: Any, where: str) -> tuple[Any, list[str]]:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value), []
        except OverflowError:
            return value, [f"{where}: must fit into a 64-bit float, is {show(value)}"]
    if hint is str and isinstance(value, str):
        return value, _text_fault(value, where)
    if hint is type(None) and value is None:
        return None, []
    if isinstance(value, hint) and not (isinstance(value, bool) and hint is not bool):
        return value, []
    if (
        hint in (int, float)
        and not isinstance(value, (str, bool))
        and hasattr(value, "item")
        and not getattr(value, "shape", 1)
    ):
        return convert(value.item(), hint, where)  # a NumPy scalar
    quoted = isinstance(value, str) and hint in (int, float)
    bare = (
        hint is str
        and isinstance(value, (int, float, datetime.date))
        and not isinstance(value, bool)
    )
    fix = "; write the number without quotes" if quoted else "; write it in quotes" if bare else ""
    return value, [
        f"{where}: must be {_words(hint)}, is {show(value)} ({type(value).__name__}){fix}"
    ]


def _text_fault(value: str, where: str) -> list[str]:
    """List why a string is not valid text: surrogates, from invalid UTF-8, or NUL characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return [f"{where}: must be text in UTF-8, is {show(value)}"]
    return (
        [f"{where}: must be text without NUL characters, is {show(value)}"] if "\0" in value else []
    )


_PLURALS = {int: "integers", float: "numbers", str: "strings"}


def _words(hint: Any, *, plural: bool = False) -> str:
    """Return the name of a type for messages."""
    if plural and hint in _PLURALS:
        return _PLURALS[hint]
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_words(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        items = _words(get_args(hint)[0], plural=True)
        return f"lists of {items}" if plural else f"a list of {items}"
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    names = {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "True or False",
        type(None): "None",
    }
    return names.get(hint, getattr(hint, "__name__", str(hint)))
