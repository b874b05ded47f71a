r"""LoRA of the stacked parameters of experts, as PEFT writes it with `target_parameters`.

`transformers` 5 stacks the kernels of a layer's experts, gate and up side by side: `gate_up_proj`
and `down_proj`. PEFT's tensors of such a parameter contain the factors of all experts: `lora_A`
`[experts * r, in]`, expert by expert, and `lora_B` `[out, r * experts]`, with the expert last. Of
two parameters, the tensors of `gate_up_proj` are those of the inner module, `base_layer`. Here each
expert is a module of its own; gate and up get the same `A`, and each its rows of `B`.

The other direction needs no conversion: PEFT stacks the tensors of the modules when it loads them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.targets import find_sites
from jaxpeft.errors import AdapterError, show
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.models.base import abstract_params
from jaxpeft.models.experts import Mixture

_log = logging.getLogger(__name__)
FIELD = "target_parameters"
_NAME = re.compile(
    r"(?P<layer>.*\.)mlp\.(experts|gate)\.(base_layer\.)?(?P<leaf>lora_[AB])\.weight"
)


@dataclass(frozen=True)
class ExpertTensor:
    """The part of a stacked tensor that belongs to one module of one expert.

    Attributes:
        stacked: the tensor in the file, `lora_A` or `lora_B`.
        experts: number of experts.
        expert: the expert.
        rows: the outputs of the module among those of the parameter, for `lora_B`; else None.
    """

    stacked: Tensor
    experts: int
    expert: int
    rows: slice | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape `[r, in]` or `[out, r]`."""
        first, last = self.stacked.shape
        if self.rows is None:
            return first // self.experts, last
        return self.rows.stop - self.rows.start, last // self.experts

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the tensor in the file."""
        return self.stacked.dtype

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def read(self) -> np.ndarray[Any, Any]:
        """Return the values."""
        whole = self.stacked.read()
        if self.rows is None:
            return whole.reshape(self.experts, -1, whole.shape[1])[self.expert]
        return whole.reshape(whole.shape[0], -1, self.experts)[self.rows, :, self.expert]


def split(
    config: Mapping[str, Any], header: Mapping[str, Any], model: Any, where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the config and the tensors of an adapter, by the modules of the experts.

    Args:
        config: content of the `adapter_config.json`.
        header: tensors of the adapter.
        model: the model to adapt.
        where: path of the config, for messages.

    Raises:
        AdapterError: The model has no such parameters, or an option of them is not supported.
    """
    wanted = config.get(FIELD)
    if not wanted:
        return dict(config), dict(header)
    mixture: Mixture | None = getattr(model.config, "mixture", None)
    if mixture is None:
        raise AdapterError(f"{where}: {FIELD}: {show(wanted)}, but the model has no experts")
    names = [wanted] if isinstance(wanted, str) else list(map(str, wanted))
    known = {"gate_up_proj": mixture.names[:2], "down_proj": mixture.names[2:], "weight": ("gate",)}
    problems = [
        f"{where}: {FIELD}: {show(name)} is not supported (supported: gate_up_proj and down_proj of"
        " experts, and gate.weight)"
        for name in names
        if name.rpartition(".")[2] not in known
    ]
    problems += [
        f"{where}: {field}: {show(key)} is a pattern of parameters, which is not supported; give"
        " all of them one rank and alpha"
        for field in ("rank_pattern", "alpha_pattern")
        for key in config.get(field) or {}
        if re.search("gate_up_proj|down_proj", str(key))
    ]
    if problems:
        raise AdapterError(problems)
    parts = {
        name: part
        for stacked, tensor in header.items()
        for name, part in _parts(stacked, tensor, mixture, names, model.config.hidden_size)
    }
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in parts if ".lora_" in name}
    own = config.get("target_modules")
    targets = {*map(str, own if isinstance(own, list) else modules)}
    added = {name for each in names for name in known[each.rpartition(".")[2]]}
    rest = {key: value for key, value in config.items() if key != FIELD}
    rest |= _without(config, outside(model, added))
    return {**rest, "target_modules": sorted({*targets, *added})}, parts


def outside(model: Any, names: Set[str]) -> list[str]:
    """List the modules outside of experts that have the name of one inside, such as
    `shared_experts.up_proj`, by the last two components of their names.

    Args:
        model: the model.
        names: names of modules of an expert.
    """
    sites = [site for site in find_sites(abstract_params(model)) if not site.experts]
    ends = (name.split(".")[-2:] for site in sites for name in site.names)
    return sorted({".".join(end) for end in ends if end[-1] in names - {"gate"}})


def warn_of_misread(config: Mapping[str, Any], model: Any, sites: Sequence[str]) -> None:
    """Log which adapted modules PEFT does not load: those outside of experts with their names.

    PEFT 0.21 takes a target such as `up_proj`, also with other components in front, for the
    parameters of the experts (`_convert_peft_config_moe`).

    Args:
        config: content of the `adapter_config.json`.
        model: the adapted model.
        sites: names of the adapted modules.
    """
    mixture: Mixture | None = getattr(model.config, "mixture", None)
    if mixture is None or config.get("peft_type") != "LORA":
        return
    lost = [
        name
        for name in sites
        if f".{paths.EXPERTS}." not in name and name.rpartition(".")[2] in mixture.names
    ]
    if lost:
        _log.warning(
            "peft takes %d adapted modules outside of the experts, such as %s, for those of the"
            " experts, and would not load their adapters; to use this adapter in peft, exclude %s",
            len(lost),
            lost[-1],
            ", ".join(sorted({".".join(name.split(".")[-2:]) for name in lost})),
        )


def _without(config: Mapping[str, Any], others: Sequence[str]) -> dict[str, Any]:
    """Return the options of a config that exclude other modules, too."""
    name = "exclude_modules"
    own = config.get(name)
    if not others:
        return {}
    if isinstance(own, str):
        ends = "|".join(map(re.escape, others))
        return {name: rf"{own}|(.*\.)?({ends})"}
    return {name: sorted({*map(str, own or ()), *others})}


def _parts(
    name: str, tensor: Any, mixture: Mixture, parameters: Sequence[str], width: int
) -> Iterator[tuple[str, Any]]:
    """Yield the tensors of the modules of experts, by name; any other tensor is unchanged.

    Args:
        name: name of the tensor in the file.
        tensor: the tensor.
        mixture: the experts.
        parameters: names of the adapted parameters.
        width: width of the residual stream.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        yield name, tensor
        return
    layer, leaf = f"{found['layer']}{mixture.module}", found["leaf"]
    if ".mlp.gate." in name:
        yield f"{layer}.gate.{leaf}.weight", tensor
        return
    joint = any(each.endswith("gate_up_proj") for each in parameters)
    down = any(each.endswith("down_proj") for each in parameters) and not found[3]
    inner = mixture.width
    outputs = (
        {mixture.names[2]: slice(0, width)}
        if down or not joint
        else dict(zip(mixture.names, (slice(0, inner), slice(inner, 2 * inner)), strict=False))
    )
    for module, outs in outputs.items():
        rows = None if leaf == "lora_A" else outs
        for expert in range(mixture.experts):
            own = f"{layer}.experts.{expert}.{module}.{leaf}.weight"
            yield own, ExpertTensor(tensor, mixture.experts, expert, rows)
