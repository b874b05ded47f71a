r"""LoRA of the stacked parameters of experts, as PEFT writes it with `target_parameters`.

`transformers` 5 stacks the kernels of a layer's experts, gate and up side by side: `gate_up_proj`
and `down_proj`. PEFT's tensors of such a parameter contain the factors of all experts: `lora_A`
`[experts * r, in]`, expert by expert, and `lora_B` `[out, r * experts]`, with the expert last. Of
two parameters, the tensors of `gate_up_proj` are those of the inner module, `base_layer`. Here each
expert is a module of its own; gate and up get the same `A`, and each its rows of `B`.

The other direction needs no conversion, because PEFT stacks the tensors of the modules when it
loads them, except for a family whose checkpoints have stacked parameters as well: those of its
experts have no modules in `transformers`. The factors of a joint `gate_up_proj` are those of PEFT.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.expressions import full_match
from jaxpeft.core.targets import find_sites
from jaxpeft.errors import AdapterError, show
from jaxpeft.hub.weights.safetensors_files import Tensor
from jaxpeft.models.base import abstract_params
from jaxpeft.models.experts import Mixture

_log = logging.getLogger(__name__)
Array = np.ndarray[Any, Any]
FIELD = "target_parameters"
_NAME = re.compile(
    r"(?P<layer>.*\.)mlp\.(experts|gate|router)\.(base_layer\.)?(?P<leaf>lora_[AB])\.weight"
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
    known = {
        "gate_up_proj": mixture.names[:-1],
        "down_proj": mixture.names[-1:],
        "weight": (mixture.routing.name,),
    }
    problems = [
        f"{where}: {FIELD}: {show(name)} is not supported (supported: gate_up_proj and down_proj of"
        f" experts, and {mixture.routing.name}.weight)"
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
    added = {name for each in names for name in _modules(each, known, mixture)}
    rest = {key: value for key, value in config.items() if key != FIELD}
    rest |= _without(config, outside(model, added - {mixture.routing.name}))
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
    return sorted({".".join(end) for end in ends if end[-1] in names})


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


def _modules(parameter: str, known: Mapping[str, Sequence[str]], mixture: Mixture) -> list[str]:
    """Return the targets for a parameter: of all layers, or full names if it is of one layer."""
    owner, _, leaf = parameter.rpartition(".")
    if re.search(r"layers\.\d+\.", owner) is None:
        return list(known[leaf])
    if leaf == "weight":
        return [owner]
    return [f"{owner}.{i}.{name}" for name in known[leaf] for i in range(mixture.experts)]


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
    if ".experts." not in name:
        yield f"{layer}.{mixture.routing.name}.{leaf}.weight", tensor
        return
    joint = any(each.endswith("gate_up_proj") for each in parameters)
    down = any(each.endswith("down_proj") for each in parameters) and not found[3]
    inner = mixture.width
    gates = (slice(0, inner), slice(inner, 2 * inner))
    outputs = (
        {mixture.names[-1]: slice(0, width)}
        if down or not joint
        else {mixture.names[0]: slice(0, 2 * inner)}
        if mixture.joint
        else dict(zip(mixture.names, gates, strict=False))
    )
    for module, outs in outputs.items():
        rows = None if leaf == "lora_A" else outs
        for expert in range(mixture.experts):
            own = f"{layer}.experts.{expert}.{module}.{leaf}.weight"
            yield own, ExpertTensor(tensor, mixture.experts, expert, rows)


_EXPERT = re.compile(r"(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<module>\w+)\.(?P<leaf>.*)")
_FACTORS = ("lora_A.weight", "lora_B.weight")


def join(
    config: Mapping[str, Any], tensors: Mapping[str, Array], sites: Sequence[str], model: Any
) -> tuple[dict[str, Any], dict[str, Array]]:
    """Return the config and the tensors of an adapter, by the parameters of a layer's experts.

    It is the inverse of `split`, for a family whose checkpoints have such parameters. Adapters that
    PEFT has not for parameters keep the names of modules, by which only jaxpeft reads them.

    Args:
        config: content of the `adapter_config.json`.
        tensors: float32 tensors of the adapter by name.
        sites: names of the adapted sites.
        model: the adapted model.

    Raises:
        AdapterError: Experts of a layer differ in what PEFT shares between them.
    """
    mixture: Mixture | None = getattr(model.config, "mixture", None)
    if mixture is None or not mixture.stacked:
        return dict(config), dict(tensors)
    router = f".{mixture.module}.{mixture.routing.name}"
    own = [site for site in sites if ".experts." in site or site.endswith(router)]
    factors = {name for name in tensors if name.endswith(_FACTORS)}
    other = [name for name in tensors.keys() - factors if any(f".{s}." in name for s in own)]
    if not own or other or not factors or config.get("use_dora"):
        return dict(config), dict(tensors)
    _require_shared(config, own)
    stacked, groups = dict[str, Array](), dict[tuple[str, str, str], dict[int, Array]]()
    for name, tensor in tensors.items():
        found = _EXPERT.fullmatch(name)
        if found is None:
            stacked[name] = tensor
        else:
            group = found["owner"], found["module"], found["leaf"]
            groups.setdefault(group, {})[int(found["expert"])] = tensor
    modules = {owner: set[str]() for owner, _, _ in groups}
    for owner, module, _ in groups:
        modules[owner].add(module)
    for (owner, module, leaf), parts in groups.items():
        inside = "base_layer." * (module == mixture.names[0] and len(modules[owner]) > 1)
        stacked[f"{owner}.{inside}{leaf}"] = _stack(f"{owner}.{module}", leaf, parts, mixture)
    return _joined_config(config, sites, own, model.config.num_hidden_layers), stacked


def _require_shared(config: Mapping[str, Any], sites: Sequence[str]) -> None:
    """Raise an error if a pattern gives parameters another rank or alpha.

    Raises:
        AdapterError: It does.
    """
    problems = [
        f"{field}: {show(key)} matches {site}, but PEFT has one rank and alpha for the parameters"
        " of experts; adapt these modules without patterns"
        for field in ("rank_pattern", "alpha_pattern")
        for key in config.get(field) or {}
        for site in [next((s for s in sites if full_match(rf"(.*\.)?({key})", s)), None)]
        if site is not None
    ]
    if problems:
        raise AdapterError(problems)


def _stack(name: str, leaf: str, parts: Mapping[int, Array], mixture: Mixture) -> Array:
    """Return the tensor of a parameter from those of its experts.

    Raises:
        AdapterError: Not all experts are adapted.
    """
    if len(parts) < mixture.experts:
        raise AdapterError(
            f"{name}: only {len(parts)} of {mixture.experts} experts are adapted, but PEFT adapts"
            " all experts of a layer; select all or none of them"
        )
    ordered = [parts[i] for i in range(mixture.experts)]
    if leaf == _FACTORS[0]:
        return np.concatenate(ordered)
    return np.stack(ordered, axis=-1).reshape(len(ordered[0]), -1)


def _joined_config(
    config: Mapping[str, Any], sites: Sequence[str], own: Sequence[str], layers: int
) -> dict[str, Any]:
    """Return a config that names the parameters of experts and routers instead of modules.

    Args:
        config: the config that names modules.
        sites: names of all adapted sites.
        own: names of the sites that are parameters in PEFT.
        layers: number of layers of the model.
    """
    names = {
        re.sub(r"\.experts\.\d+\.", ".experts.", site) + ("" if ".experts." in site else ".weight")
        for site in own
    }
    ends: dict[str, list[str]] = {}
    for name in names:
        ends.setdefault(re.sub(r".*layers?\.\d+\.", "", name), []).append(name)
    parameters = [
        name for end, full in ends.items() for name in ([end] if len(full) == layers else full)
    ]
    rest = sorted({*sites} - {*own})
    wanted: Any = config.get("target_modules")
    selected = any(config.get(key) is not None for key in _SELECTION)
    if isinstance(wanted, list | tuple) and not selected:
        kept = [e for e in wanted if any(f".{site}".endswith(f".{e}") for site in rest)]
        changed = {"target_modules": kept}
    else:
        changed = {"target_modules": rest, **dict.fromkeys(_SELECTION)}
    return {**config, **changed, FIELD: sorted(parameters)}


_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")
"""Options that select among `target_modules`."""
