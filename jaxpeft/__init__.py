"""jaxpeft: parameter-efficient fine-tuning of pretrained models in JAX.

A fine-tuning method is a pure function that rewrites a Flax parameter tree, and everything else is
a pure function over that same tree:

    model, params = jaxpeft.load("path/to/model", task="causal_lm")
    method = jaxpeft.LoRA(rank=8, alpha=16, targets="all-linear")
    params = jaxpeft.rewrite(method, params, jax.random.key(0))
    logits = jaxpeft.apply(model, params, input_ids, attention_mask)
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from jaxpeft.core.bank import bank as bank
    from jaxpeft.core.bank import pick as pick
    from jaxpeft.core.hotswap import pad_rank as pad_rank
    from jaxpeft.core.method import Method as Method
    from jaxpeft.core.nnx import params_of as params_of
    from jaxpeft.core.nnx import with_params as with_params
    from jaxpeft.core.probing import find_sites as find_sites
    from jaxpeft.core.rewriting import adapter_names as adapter_names
    from jaxpeft.core.rewriting import trainable_mask as trainable_mask
    from jaxpeft.core.rewriting import without_adapter as without_adapter
    from jaxpeft.core.tree import combine as combine
    from jaxpeft.core.tree import partition as partition
    from jaxpeft.core.tree import stack_layers as stack_layers
    from jaxpeft.core.tree import unstack_layers as unstack_layers
    from jaxpeft.errors import JaxpeftError as JaxpeftError
    from jaxpeft.forward import apply as apply
    from jaxpeft.hub.adapters.load import load_adapter as load_adapter
    from jaxpeft.hub.adapters.load import read_settings as read_settings
    from jaxpeft.hub.adapters.save import save_adapter as save_adapter
    from jaxpeft.hub.adapters.settings import Settings as Settings
    from jaxpeft.hub.loading import load as load
    from jaxpeft.inference.generation import generate as generate
    from jaxpeft.methods import *  # noqa: F403 - the classes of all methods
    from jaxpeft.methods import METHODS as METHODS
    from jaxpeft.quant.quantize import Quant as Quant
    from jaxpeft.quant.quantize import dequantize as dequantize
    from jaxpeft.quant.quantize import quantize as quantize
    from jaxpeft.sharding.layout import shardings as shardings
    from jaxpeft.sharding.layout import state_shardings as state_shardings
    from jaxpeft.sharding.logical_axes import on_mesh as on_mesh
    from jaxpeft.sharding.mesh import batch_shardings as batch_shardings
    from jaxpeft.sharding.mesh import create_device_mesh as create_device_mesh
    from jaxpeft.sharding.mesh_config import MeshConfig as MeshConfig
    from jaxpeft.sharding.rules import sharding_rules as sharding_rules
    from jaxpeft.transforms.merge import merge as merge
    from jaxpeft.transforms.merge_quantized import merge_quantized as merge_quantized
    from jaxpeft.transforms.rewrite import rewrite as rewrite
    from jaxpeft.transforms.weighted import merge_adapters as merge_adapters

_WHERE = {
    "bank": "core.bank",
    "pick": "core.bank",
    "pad_rank": "core.hotswap",
    "merge_adapters": "transforms.weighted",
    "merge_quantized": "transforms.merge_quantized",
    "Quant": "quant.quantize",
    "quantize": "quant.quantize",
    "dequantize": "quant.quantize",
    "find_sites": "core.probing",
    "params_of": "core.nnx",
    "with_params": "core.nnx",
    "without_adapter": "core.rewriting",
    "adapter_names": "core.rewriting",
    "Method": "core.method",
    "merge": "transforms.merge",
    "rewrite": "transforms.rewrite",
    "trainable_mask": "core.rewriting",
    "combine": "core.tree",
    "partition": "core.tree",
    "stack_layers": "core.tree",
    "unstack_layers": "core.tree",
    "JaxpeftError": "errors",
    "apply": "forward",
    "load_adapter": "hub.adapters.load",
    "read_settings": "hub.adapters.load",
    "save_adapter": "hub.adapters.save",
    "load": "hub.loading",
    "Settings": "hub.adapters.settings",
    "MeshConfig": "sharding.mesh_config",
    "create_device_mesh": "sharding.mesh",
    "batch_shardings": "sharding.mesh",
    "sharding_rules": "sharding.rules",
    "shardings": "sharding.layout",
    "state_shardings": "sharding.layout",
    "on_mesh": "sharding.logical_axes",
    "METHODS": "methods",
}

_RENAMED = {
    "quantise": "quantize",
    "dequantise": "dequantize",
    "merge_quantised": "merge_quantized",
}
"""Deprecated public names of versions before 0.2."""


def __getattr__(name: str) -> Any:
    """Import a public name on first use, so that `jaxpeft.train` can check a config before JAX is
    imported.

    Raises:
        AttributeError: no such name exists. Python also calls this for submodules before importing
            them, so names that cannot be a class import nothing.
    """
    if name in _RENAMED:
        warnings.warn(
            f"jaxpeft.{name} is deprecated; use jaxpeft.{_RENAMED[name]}",
            DeprecationWarning,
            stacklevel=2,
        )
        name = _RENAMED[name]
    if name in _WHERE:
        return getattr(importlib.import_module(f"jaxpeft.{_WHERE[name]}"), name)
    if name == "generate":  # a package that is called like its function
        return importlib.import_module("jaxpeft.generate")
    if name == "__all__":
        return __dir__()
    if name[:1].isupper() and name in _methods():
        return _methods()[name]
    raise AttributeError(f"module 'jaxpeft' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(["__version__", "generate", *_WHERE, *_methods()])


def _methods() -> dict[str, Any]:
    """Return the method classes by name, from the registry of methods."""
    return {
        cls.__name__: cls for cls in importlib.import_module("jaxpeft.methods").METHODS.values()
    }
