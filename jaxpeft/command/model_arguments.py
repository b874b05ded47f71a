"""Arguments of the commands that use a trained model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxpeft.choices import Dtype, QuantForm, Strategy, Task
from jaxpeft.command.parser import Arguments
from jaxpeft.core.options import option


@dataclass(frozen=True, kw_only=True)
class ModelArguments(Arguments):
    """Which model to load, and how."""

    model: str | None = option(
        None, "folder or hub id of the base; by default the one recorded in the adapter"
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
