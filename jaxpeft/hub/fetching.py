"""Moving the base's kernels from where they are stored to where a layer computes."""

from __future__ import annotations

import dataclasses
import logging

import jax
from jax.sharding import Mesh

from jaxpeft.errors import ConfigError
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.layout import HOST, Layout, gathered_codes
from jaxpeft.sharding.mesh_config import MeshConfig
from jaxpeft.sharding.rules import Rules

_log = logging.getLogger(__name__)


def require_host_memory(options: MeshConfig | Rules, mesh: Mesh) -> None:
    """Raise an error if offloading is requested but the devices cannot use host memory.

    Raises:
        ConfigError: There is no host memory; it names the available memories.
    """
    if not options.offload:
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"mesh.offload: the devices ({device.device_kind}) have no {HOST} memory (they have"
            f" {', '.join(kinds)}); set it to False"
        )


def fetch_kernels(model: Pretrained, found: Layout) -> Pretrained:
    """Return a model whose layers fetch their kernels one layer at a time.

    Kernels in host memory are copied to the device. The codes of quantized kernels sharded along
    `fsdp` are gathered before they are decoded; by default, XLA's partitioner would gather the
    decoded kernels, which for NF4 are four times as large.

    The fetched kernels must not be saved for the backward pass: without rematerialization, that
    would be the entire base.

    Args:
        model: the model.
        found: the layout of its base's stored leaves.
    """
    options = model.options
    waits = any(where.memory_kind == HOST for where in jax.tree.leaves(found.shardings))
    gathered = gathered_codes(found)
    remat = "products" if options.remat == "none" and (waits or gathered) else options.remat
    if remat != options.remat:
        _log.info(
            "using remat=%s instead of none: otherwise the fetched kernels, the entire base, would"
            " be saved for the backward pass",
            remat,
        )
    return model.clone(
        options=dataclasses.replace(options, offload=waits, gathered=gathered, remat=remat)
    )
