"""Head modules that a base's checkpoint has, and that PEFT therefore does not save."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.hub.adapters.adapterhub import TensorView, torch_layout
from jaxpeft.hub.weights.safetensors_files import open_folder
from jaxpeft.models import FAMILIES
from jaxpeft.models.base import Pretrained


def with_pretrained_heads(
    method: Method, header: Mapping[str, Any], model: Pretrained, params: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors of a file, with those of head modules that it leaves to the base.

    Args:
        method: method of the adapter.
        header: tensors of the file.
        model: the model from `load`.
        params: the base, whose head modules are those of its checkpoint, if it has them.
    """
    family = FAMILIES.get(getattr(model.config, "kind", ""))
    prefix, found = method.peft.module_prefix, dict(header)
    for module in family.pretrained_heads if family else ():
        if module not in params:
            continue
        absent = not any(name.startswith(f"{prefix}{module}.") for name in header)
        tensors = open_folder(model.source.folder) if absent and model.source else {}
        if any(name.startswith(f"{module}.") for name in tensors):
            for path, leaf in paths.walk(params[module]):
                (name,) = paths.hf_names((module, *path))
                found[f"{prefix}{name}"] = TensorView(torch_layout(path, leaf))
    return found
