"""Read YAML and JSON configs; options that are set twice are errors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jaxpeft.errors import ConfigError, WeightsError, shorten
from jaxpeft.json_files import parse_json


def read(path: Path) -> dict[str, Any]:
    """Read a YAML or JSON config file.

    Raises:
        ConfigError: the file cannot be read, is not YAML or JSON, sets an option twice, or has no
            sections.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    values = READERS[path.suffix](text, path)
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{path}: must contain sections such as model and train, contains a"
            f" {type(values).__name__}"
        )
    found = {str(key): value for key, value in cast(Mapping[object, Any], values).items()}
    found.pop("$schema", None)  # tells editors the schema of a JSON file
    return found


def _read_json(text: str, path: Path) -> object:
    try:
        return parse_json(text, str(path), once=True)
    except WeightsError as error:
        raise ConfigError(error.problems) from error


def _read_yaml(text: str, path: Path) -> object:
    from ruamel.yaml import YAML  # YAML 1.2: 1e-4 is a number, and yes a word
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        values: object = YAML(typ="safe", pure=True).load(text)
    except DuplicateKeyError as error:
        twice = str(error.problem).split('"')[1]
        raise ConfigError(
            f"{path}{_place(error)}: sets {twice!r} twice; remove one of them"
        ) from error
    except MarkedYAMLError as error:
        raise ConfigError(
            f"{path}{_place(error)}: {shorten(str(error.problem or error.context), 200)}"
        ) from error
    except YAMLError as error:
        raise ConfigError(
            f"{path}: not YAML ({shorten(' '.join(str(error).split()), 200)})"
        ) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, or an invalid date
        raise ConfigError(
            f"{path}: not a config ({shorten(str(error) or type(error).__name__, 200)})"
        ) from error
    return {} if values is None else values


def _place(error: Any) -> str:
    """Return the 1-based line and column of a YAML error."""
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}:{mark.column + 1}" if mark else ""


READERS = {".yaml": _read_yaml, ".yml": _read_yaml, ".json": _read_json}
"""Reader of each file extension."""
