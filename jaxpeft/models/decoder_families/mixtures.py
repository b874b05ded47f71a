"""The reading of a mixture of experts from `config.json`."""

from __future__ import annotations

from collections.abc import Callable

from jaxpeft.models.base import ConfigReader
from jaxpeft.models.experts import Clamp, Mixture
from jaxpeft.models.router import Routing

GATED = ("gate_proj", "up_proj", "down_proj")
"""The usual names of the modules of an expert."""
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Names of the number of experts; the first is what transformers 5 writes for most families."""


def read_mixture(
    module: str,
    names: tuple[str, ...],
    width: str,
    routing: Routing | Callable[[ConfigReader], Routing],
    *,
    shared: str = "",
    bias: bool = False,
    stacked: bool = False,
    clamp: Callable[[ConfigReader], Clamp] | None = None,
) -> Callable[[ConfigReader], Mixture]:
    """Return the part `mixture` of a family, read from its `config.json`.

    Args:
        module: see `Mixture`.
        names: see `Mixture`.
        width: field of `config.json` with the width of an expert.
        routing: see `Mixture`; or what reads it.
        shared: field with the number of experts that all tokens share; empty if there are none.
        bias: see `Mixture`.
        stacked: see `Mixture`.
        clamp: reads its `clamp`; None for none.
    """

    def read(reader: ConfigReader) -> Mixture:
        experts = next((name for name in _COUNTS if reader.get(name) is not None), _COUNTS[0])
        count = reader.integer(experts)
        chosen = reader.integer("num_experts_per_tok")
        if chosen > count:
            reader.problems.append(
                f"num_experts_per_tok: is {chosen}, but there are only {count} experts ({experts})"
            )
        found = routing(reader) if callable(routing) else routing
        reader.problems.extend(found.problems(count, chosen))
        wide = reader.integer(width)
        return Mixture(
            module,
            names,
            count,
            min(chosen, count),
            wide,
            found,
            reader.number("router_aux_loss_coef") if reader.flag("output_router_logits") else 0.0,
            wide * reader.integer(shared) if shared else 0,
            bias,
            stacked,
            clamp and clamp(reader),
        )

    return read
