"""The methods, one file each. A new method is one file and one line in `_ALL`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpeft.core.method import Method
from jaxpeft.core.options import parse
from jaxpeft.errors import ConfigError, nearest, show
from jaxpeft.methods.adalora import AdaLoRA
from jaxpeft.methods.adapter import Adapter
from jaxpeft.methods.beft import BEFT
from jaxpeft.methods.bitfit import BitFit
from jaxpeft.methods.boft import BOFT
from jaxpeft.methods.c3a import C3A
from jaxpeft.methods.cartridge import Cartridge
from jaxpeft.methods.compacter import Compacter
from jaxpeft.methods.deft import DEFT
from jaxpeft.methods.delora import DeLoRA
from jaxpeft.methods.dora import DoRA
from jaxpeft.methods.fourierft import FourierFT
from jaxpeft.methods.freeze import Freeze
from jaxpeft.methods.full import Full
from jaxpeft.methods.glora import GLoRA
from jaxpeft.methods.gralora import GraLoRA
from jaxpeft.methods.head import Head
from jaxpeft.methods.hira import HiRA
from jaxpeft.methods.hra import HRA
from jaxpeft.methods.ia3 import IA3
from jaxpeft.methods.ln_tuning import LNTuning
from jaxpeft.methods.loha import LoHa
from jaxpeft.methods.lokr import LoKr
from jaxpeft.methods.lora import LoRA
from jaxpeft.methods.lora_fa import LoRAFA
from jaxpeft.methods.miss import MiSS
from jaxpeft.methods.mixed import Mixed
from jaxpeft.methods.oft import OFT
from jaxpeft.methods.osf import OSF
from jaxpeft.methods.peanut import PEANuT
from jaxpeft.methods.prefix import PrefixTuning, PTuningV2
from jaxpeft.methods.prompt import PromptTuning
from jaxpeft.methods.ptuning import PTuning
from jaxpeft.methods.pvera import PVeRA
from jaxpeft.methods.randlora import RandLora
from jaxpeft.methods.road import RoAd
from jaxpeft.methods.shira import SHiRA
from jaxpeft.methods.supertuning import SuperTuning
from jaxpeft.methods.trainable_tokens import TrainableTokens
from jaxpeft.methods.unilora import UniLoRA
from jaxpeft.methods.vblora import VBLoRA
from jaxpeft.methods.vera import VeRA
from jaxpeft.methods.waveft import WaveFT

_ALL: tuple[type[Method], ...] = (
    LoRA,
    DoRA,
    LoRAFA,
    VeRA,
    PVeRA,
    AdaLoRA,
    RandLora,
    GraLoRA,
    VBLoRA,
    UniLoRA,
    HiRA,
    PEANuT,
    GLoRA,
    DEFT,
    OSF,
    IA3,
    LoHa,
    LoKr,
    C3A,
    FourierFT,
    WaveFT,
    SHiRA,
    SuperTuning,
    OFT,
    BOFT,
    HRA,
    RoAd,
    DeLoRA,
    MiSS,
    Adapter,
    Compacter,
    PrefixTuning,
    PTuningV2,
    Cartridge,
    PromptTuning,
    PTuning,
    BEFT,
    BitFit,
    LNTuning,
    Freeze,
    TrainableTokens,
    Head,
    Full,
    Mixed,
)

METHODS: Mapping[str, type[Method]] = {method.name: method for method in _ALL}
"""Every method by its name in configs and files."""


def read(values: Mapping[str, Any], where: str) -> tuple[Method | None, list[str]]:
    """Make a method from plain values, with its class given by `name`; report all problems at once.

    Args:
        values: plain values, from `as_dict`.
        where: their name in messages, such as `config.method`.

    Returns:
        `(method, [])`, or `(None, problems)`.
    """
    name = values.get("name", "lora")
    if not isinstance(name, str) or name not in METHODS:
        near = nearest(name, METHODS) if isinstance(name, str) else ""
        return None, [
            f"{where}.name: {show(name)} is not a method{near} (known: {', '.join(METHODS)})"
        ]
    return parse(
        METHODS[name], {key: value for key, value in values.items() if key != "name"}, where
    )


def from_dict(values: Mapping[str, Any]) -> Method:
    """Return the method with these values; the inverse of `as_dict`.

    Raises:
        ConfigError: The method does not exist, or an option is invalid.
    """
    method, problems = read(values, "method")
    if method is None:
        raise ConfigError(problems)
    return method


MARKERS: Mapping[str, type[Method]] = {
    (method.leaves.site or method.leaves.root)[0]: method
    for method in reversed(_ALL)  # the first of methods with the same marker, such as LoRA
    if method.leaves.site or method.leaves.root
}
"""The method that computes a module with a given marker leaf."""
