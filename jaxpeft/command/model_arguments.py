"""Arguments of the commands that use a trained model."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from jaxpeft.choices import Dtype, QuantForm, Strategy, Task
from jaxpeft.command.parser import Arguments
from jaxpeft.config.data_config import DATA_FIELDS
from jaxpeft.core.options import option
from jaxpeft.errors import ConfigError, DataError, nearest

NEW_TOKENS = 256
"""Default of the maximum number of new tokens. A shorter one cuts answers and lowers scores."""


@dataclass(frozen=True, kw_only=True)
class ModelArguments(Arguments):
    """Which model to load, and how."""

    model: str | None = option(
        None,
        "folder or hub id of the base; by default the one recorded in the adapter",
        also=("base",),
    )
    adapter: str | None = option(
        None, "folder of the adapter, or of the run that trained it; by default the base alone"
    )
    task: Task | None = option(None, "task, if the adapter does not record it")
    dtype: Dtype | None = option(None, "dtype of the base; by default the checkpoint's")
    quant: QuantForm | None = option(
        None, "quantization of the base; by default that of the adapter's run"
    )
    strategy: Strategy | None = option(
        None, "sharding strategy over all devices; by default one device"
    )
    allow_base: bool = option(False, "accept a base that is not the adapter's")
    columns: tuple[str, ...] = option(
        (), "columns of the rows as FIELD=COLUMN, such as label=category; by default the run's"
    )

    def column_problems(self) -> list[str]:
        """List the problems of `--columns`."""
        found: list[str] = []
        for one in self.columns:
            field, _, column = one.partition("=")
            if not field or not column:
                found.append(f"--columns: {one!r} must be FIELD=COLUMN, such as label=category")
            elif field not in DATA_FIELDS:
                found.append(
                    f"--columns: {field!r} is not a field{nearest(field, DATA_FIELDS)} (known:"
                    f" {', '.join(DATA_FIELDS)})"
                )
        return found

    def read_columns(self) -> dict[str, str]:
        """Return the columns by field."""
        return dict(one.split("=", 1) for one in self.columns)

    @property
    def load_options(self) -> dict[str, Any]:
        """The arguments of `load_adapted`, in addition to the base and the adapter."""
        from jaxpeft.sharding.mesh_config import MeshConfig

        return {
            "task": self.task,
            "dtype": self.dtype,
            "quant": self.quant,
            "sharding": None if self.strategy is None else MeshConfig(strategy=self.strategy),
            "allow_base": self.allow_base,
        }


@contextmanager
def data_flags() -> Generator[None]:
    """Name the flags of a command in errors about rows, instead of the options of a config."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise type(error)([_in_flags(problem) for problem in error.problems]) from error


def _in_flags(problem: str) -> str:
    for name in ("columns", "format", "separator", "chat_template"):
        problem = problem.replace(f"data.{name}", f"--{name.replace('_', '-')}")
    return problem
