"""Gemma 4: the text models of `gemma4` and `gemma4_unified` (Gemma team 2026).

Layers without a window have heads of another size, and may have another number of key heads, whose
projection is that of the values too. The last layers attend to the keys and values of the last
layer of their kind before them. Both kinds of checkpoints have the same text model, but per-layer
embeddings only `gemma4`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpeft.errors import show
from jaxpeft.models.base import MOST_HEADS, ConfigReader
from jaxpeft.models.decoder_config import DecoderFamily
from jaxpeft.models.decoder_families.gemma import GEMMA3
from jaxpeft.models.layer_embeddings import LayerEmbedding
from jaxpeft.models.layer_types import FULL, full_every

_SIZES = ("head_dim", "num_key_value_heads")


def _types(reader: ConfigReader, layers: int) -> Sequence[str]:
    """The last layer has no window, whatever `layer_types` says."""
    return [*full_every(6)(reader, layers)[:-1], FULL]


def _layer_embedding(reader: ConfigReader) -> LayerEmbedding | None:
    width, vocab = "hidden_size_per_layer_input", "vocab_size_per_layer_input"
    if not reader.get(width):
        return None
    found = LayerEmbedding(reader.integer(vocab), reader.integer(width))
    words = reader.get("vocab_size")
    if isinstance(words, int) and found.vocab_size < words:
        reader.problems.append(
            f"{vocab}: {found.vocab_size} is less than vocab_size {words}, so that tokens have no"
            " embeddings for each layer"
        )
    return found


def _full_sizes(reader: ConfigReader, types: Sequence[str]) -> Mapping[str, int]:
    """Return the sizes of layers without a window, where they differ from those of the others.

    They are in `per_layer_config` by the number of the layer, as transformers 5 writes them, or
    named `global_head_dim` and `num_global_key_value_heads`.
    """
    saved: Any = reader.get("per_layer_config")
    if saved is None:
        found = {"head_dim": reader.integer("global_head_dim", most=MOST_HEADS)}
        fewer = "num_global_key_value_heads"
        if reader.flag("attention_k_eq_v") and reader.get(fewer) is not None:
            found["num_key_value_heads"] = reader.integer(fewer, most=MOST_HEADS)
        return found
    numbers = [str(i) for i, kind in enumerate(types) if kind == FULL]
    each = [saved.get(number, {}) for number in numbers] if isinstance(saved, Mapping) else []
    first = each[0] if each and isinstance(each[0], Mapping) else {}
    if (
        not each
        or not set(saved) <= set(numbers)
        or not set(first) <= set(_SIZES)
        or any(other != first for other in each)
        or not all(type(size) is int and 1 <= size <= MOST_HEADS for size in first.values())
    ):
        reader.problems.append(
            f"per_layer_config: {show(saved)} is not supported (supported: integers"
            f" {' and '.join(_SIZES)}, the same for every {FULL} layer)"
        )
        return {}
    return first


def _check_sizes(reader: ConfigReader, sizes: Mapping[str, int]) -> None:
    size, kv_heads = (sizes.get(name) for name in _SIZES)
    heads = reader.get("num_attention_heads")
    if size is not None and size % 2:
        reader.problems.append(
            f"head_dim of {FULL} layers: must be even for rotary embeddings, is {size}"
        )
    if kv_heads is not None and isinstance(heads, int) and heads % kv_heads:
        reader.problems.append(
            f"num_key_value_heads of {FULL} layers: {kv_heads} does not divide"
            f" num_attention_heads {heads}"
        )


def _shared(reader: ConfigReader, types: Sequence[str]) -> dict[int, int]:
    """Return the layer whose keys and values each of the last layers attends to."""
    name = "num_kv_shared_layers"
    if not reader.get(name):
        return {}
    first = len(types) - reader.integer(name, most=max(1, len(types) - 1))
    last = {kind: i for i, kind in enumerate(types[:first])}
    if missing := sorted(set(types) - set(last)):
        reader.problems.append(
            f"{name}: {show(reader.get(name))} is not supported: no {' or '.join(missing)} layer"
            " before them has keys and values"
        )
        return {}
    return {i: last[types[i]] for i in range(first, len(types))}


def _layer_parts(reader: ConfigReader, layers: int) -> Sequence[Mapping[str, Any]]:
    known = len(reader.problems)
    types = _types(reader, layers)
    del reader.problems[known:]  # those of the kinds of layers are recorded already
    sizes = _full_sizes(reader, types)
    _check_sizes(reader, sizes)
    shared = _shared(reader, types)
    width = reader.get("intermediate_size")
    wide = reader.flag("use_double_wide_mlp") and isinstance(width, int)
    joint = reader.flag("attention_k_eq_v")
    bidirectional = reader.get("use_bidirectional_attention")
    if bidirectional not in (None, False, "vision"):  # images attend to later positions, not text
        reader.refuse("use_bidirectional_attention", "decoders attend to earlier positions only")
    found: list[dict[str, Any]] = []
    for i, kind in enumerate(types):
        own: dict[str, Any] = {**sizes, "keys_as_values": joint} if kind == FULL else {}
        if i in shared:
            own |= {"keys_of": shared[i], "intermediate_size": 2 * width if wide else width}
        elif i in shared.values():
            own |= {"kept_as": i}
        found.append(own)
    return found


GEMMA4 = DecoderFamily(
    "gemma4_text",
    defaults={
        **GEMMA3.defaults,
        "vocab_size": 262144,
        "num_hidden_layers": 30,
        "global_head_dim": 512,
        "sliding_window": 512,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 256,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {
                "rope_type": "proportional",
                "partial_rotary_factor": 0.25,
                "rope_theta": 1e6,
            },
        },
    },
    layer_types=_types,
    ropes=GEMMA3.ropes,
    parts={
        **GEMMA3.parts,
        "norm_offset": 0.0,
        "attention_scale": 1.0,
        "value_norm": True,
        "layer_scalar": True,
        "layer_embedding": _layer_embedding,
    },
    layer_parts=_layer_parts,
    refused={"enable_moe_block": "layers have no experts beside their feed-forward"},
    # checkpoints have the keys and values of layers that do not use them
    ignored=(r"layers\.\d+\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\.\w+",),
)


GEMMA4_UNIFIED = dataclasses.replace(
    GEMMA4,
    model_type="gemma4_unified_text",
    defaults={
        **GEMMA4.defaults,
        "sliding_window": 1024,
        "max_position_embeddings": 262144,
        "hidden_size_per_layer_input": 0,
    },
    refused={},
)
