"""The reading of a mixture of experts from `config.json`."""

from __future__ import annotations

from collections.abc import Callable

from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import Part
from jaxpeft.models.experts import Clamp, Mixture


def read_mixture(
    module: str,
    names: tuple[str, ...],
    width: str,
    normalized: Part,
    *,
    router: str = "gate",
    bias: bool = False,
    stacked: bool = False,
    clamp: Callable[[ConfigReader], Clamp] | None = None,
) -> Callable[[ConfigReader], Mixture]:
    """Return the part `mixture` of a family, read from its `config.json`.

    Args:
        module: see `Mixture`.
        names: see `Mixture`.
        width: field of `config.json` with the width of an expert.
        normalized: see `Mixture`.
        router: see `Mixture`.
        bias: see `Mixture`.
        stacked: see `Mixture`.
        clamp: reads its `clamp`; None for none.
    """

    def read(reader: ConfigReader) -> Mixture:
        local = "num_local_experts"  # what transformers 5 writes for every family
        experts = "num_experts" if reader.get(local) is None else local
        count = reader.integer(experts)
        chosen = reader.integer("num_experts_per_tok")
        if chosen > count:
            reader.problems.append(
                f"num_experts_per_tok: is {chosen}, but there are only {count} experts ({experts})"
            )
        return Mixture(
            module,
            names,
            count,
            min(chosen, count),
            reader.integer(width),
            bool(normalized(reader) if callable(normalized) else normalized),
            reader.number("router_aux_loss_coef") if reader.flag("output_router_logits") else 0.0,
            router,
            bias,
            stacked,
            clamp and clamp(reader),
        )

    return read
