"""How the base comes from where it lies to where a layer computes."""

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
    """Refuse to offload where the devices have no such memory.

    Raises:
        ConfigError: naming the memories that they have.
    """
    if not options.offload:
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"mesh.offload: the devices ({device.device_kind}) have no memory of kind {HOST} (they"
            f" have {', '.join(kinds)}); set it to False"
        )


def fetch_kernels(model: Pretrained, found: Layout) -> Pretrained:
    """Return a model whose layers bring their kernels to where they compute with them, each when it
    is its turn.

    Kernels that wait in the host's memory are fetched. The codes of quantized ones that lie along
    `fsdp` are gathered before they are decoded: left to itself the partitioner gathers what they
    are decoded to, four times as much of NF4.

    What the backward pass finds again must not be kept on the devices: with a remat of `none` it
    would be all of them.

    Args:
        model: of the run.
        found: where the leaves of its base lie, as they are stored.
    """
    options = model.options
    waits = any(where.memory_kind == HOST for where in jax.tree.leaves(found.shardings))
    gathered = gathered_codes(found)
    remat = "products" if options.remat == "none" and (waits or gathered) else options.remat
    if remat != options.remat:
        _log.info(
            "remat %s instead of none: otherwise the backward pass would keep the fetched kernels,"
            " which are the whole base",
            remat,
        )
    return model.clone(
        options=dataclasses.replace(options, offload=waits, gathered=gathered, remat=remat)
    )
