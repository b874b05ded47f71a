"""SmolLM3 (Bakouch et al. 2025)."""

from __future__ import annotations

from collections.abc import Sequence

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader
from jaxpeft.models.decoder_config import DecoderFamily
from jaxpeft.models.decoder_families.llama import LLAMA
from jaxpeft.models.layer_types import FULL, SLIDING, named_types
from jaxpeft.models.rope import NO_ROPE


def _rotating(reader: ConfigReader, layers: int) -> list[bool] | None:
    """Return which layers rotate queries and keys; None if the config does not say it properly."""
    named = reader.get("no_rope_layers")
    if named is None:
        every = reader.get("no_rope_layer_interval")
        valid = isinstance(every, int) and every > 0
        return [(i + 1) % every != 0 for i in range(layers)] if valid else None
    if not isinstance(named, list) or len(named) != layers or any(n not in (0, 1) for n in named):
        return None
    return [bool(on) for on in named]


def _smollm3_types(reader: ConfigReader, layers: int) -> Sequence[str]:
    windows = reader.flag("use_sliding_window") and reader.get("sliding_window") is not None
    rotating = _rotating(reader, layers) or [True] * layers
    usual = [SLIDING if windows and not on else FULL for on in rotating]
    found = named_types(reader, layers, usual)
    return found if windows else [FULL] * layers


def _smollm3_ropes(reader: ConfigReader) -> tuple[int, ...] | None:
    layers = reader.get("num_hidden_layers")
    rotating = _rotating(reader, layers) if isinstance(layers, int) else []
    if rotating is None:
        reader.problems.append(
            f"no_rope_layers: must be a list of {layers} numbers, 1 for a rotation and 0 for none,"
            f" is {show(reader.get('no_rope_layers'))}"
        )
        return None
    return tuple(int(not on) for on in rotating)


SMOLLM3 = DecoderFamily(
    "smollm3",
    defaults={
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "pad_token_id": 128004,
    },
    layer_types=_smollm3_types,
    parts={
        **LLAMA.parts,
        "other_ropes": (NO_ROPE,),
        "layer_ropes": _smollm3_ropes,
    },
)
