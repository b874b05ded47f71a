"""The kinds of a decoder's layers, with a window or without, as `config.json` names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxpeft.errors import show
from jaxpeft.models.base import ConfigReader

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
BY_LAYERS = (FULL, SLIDING)
"""The kinds of layers that a config with one rotation for each names."""
LayerTypes = Callable[[ConfigReader, int], Sequence[str]]
"""Reads the kind of each layer, given their number."""


def no_windows(reader: ConfigReader, layers: int) -> Sequence[str]:
    """Every layer attends to all earlier positions, whatever `layer_types` says."""
    del reader
    return [FULL] * layers


def full_every(number: int, name: str | None = None) -> LayerTypes:
    """Every n-th layer has no window, unless `layer_types` says otherwise.

    Args:
        number: n.
        name: field of the `config.json` that overrides n.
    """

    def types(reader: ConfigReader, layers: int) -> Sequence[str]:
        every = number if name is None or reader.get(name) is None else reader.integer(name)
        usual = [FULL if (i + 1) % every == 0 else SLIDING for i in range(layers)]
        return named_types(reader, layers, usual)

    return types


def all_sliding(reader: ConfigReader, layers: int) -> Sequence[str]:
    """Every layer has a window, unless `layer_types` says otherwise."""
    return named_types(reader, layers, [SLIDING] * layers)


def upper_sliding(reader: ConfigReader, layers: int) -> Sequence[str]:
    """Layers from `max_window_layers` on have a window, if `use_sliding_window` is on."""
    if not reader.flag("use_sliding_window"):
        return named_types(reader, layers, [FULL] * layers, windows=False)
    upper = reader.integer("max_window_layers", least=0)
    return named_types(reader, layers, [FULL if i < upper else SLIDING for i in range(layers)])


def named_types(
    reader: ConfigReader,
    layers: int,
    usual: Sequence[str],
    *,
    windows: bool = True,
    kinds: Sequence[str] = (FULL, SLIDING),
) -> Sequence[str]:
    """Return `layer_types`, or the usual ones if the field is missing.

    Args:
        reader: reader of the `config.json`.
        layers: number of layers.
        usual: the kinds of a config without the field.
        windows: whether a window is set.
        kinds: the supported kinds.
    """
    named = reader.get("layer_types")
    if named is None:
        return usual
    if not isinstance(named, list) or len(named) != layers or any(n not in kinds for n in named):
        reader.problems.append(
            f"layer_types: {show(named)} is not supported (supported: {' or '.join(kinds)},"
            f" {layers} times)"
        )
        return usual
    if SLIDING in named and not (windows and reader.get("sliding_window")):
        reader.problems.append(
            f"layer_types: {SLIDING} needs use_sliding_window true and sliding_window a number"
        )
    return named


def read_windows(reader: ConfigReader, types: Sequence[str]) -> tuple[int, ...] | None:
    """Return the window of each layer, 0 for none; None if no layer has one.

    Args:
        reader: reader of the `config.json`.
        types: the kind of each layer.
    """
    if SLIDING not in types or reader.get("sliding_window") is None:
        return None
    window = reader.integer("sliding_window")
    return tuple(window if kind == SLIDING else 0 for kind in types)
