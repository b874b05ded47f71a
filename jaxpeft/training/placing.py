"""Where the base of a run lies: read onto the devices by the rules, and what offloading it asks for."""

from __future__ import annotations

import dataclasses

from jax.sharding import Mesh

from jaxpeft.config.mesh import MeshConfig
from jaxpeft.core.paths import Tree
from jaxpeft.errors import ConfigError
from jaxpeft.hub.loading import Outline
from jaxpeft.sharding.rules import Rules
from jaxpeft.sharding.specs import HOST, by_path, layout, log_dropped


def check(options: MeshConfig, mesh: Mesh) -> None:
    """Refuses to offload where the devices have no such memory.

    Raises:
        ConfigError: naming the memories that they have.
    """
    if not options.offload:
        return
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"mesh.offload: the devices ({device.device_kind}) have no memory of kind {HOST} (they have {', '.join(kinds)}); set it to False"
        )


def offloaded(outlined: Outline) -> Outline:
    """Gives a model whose layers fetch their kernels from the host's memory, each when it is its turn.

    What the backward pass finds again must not be kept on the devices: with a remat of `none` it would be all of them.
    """
    options = outlined.model.options
    remat = "products" if options.remat == "none" else options.remat
    return dataclasses.replace(
        outlined, model=outlined.model.clone(options=dataclasses.replace(options, offload=True, remat=remat))
    )


def read(outlined: Outline, seed: int, mesh: Mesh, rules: Rules) -> Tree:
    """Reads the base, each leaf to where the rules say.

    Args:
        outlined: the model.
        seed: of the leaves of a newly made head.
        mesh: the devices.
        rules: of the run.
    """
    found = layout(mesh, rules, outlined.leaves)
    log_dropped(found)
    return outlined.read(seed, by_path(found.shardings))
