"""How PEFT keeps methods of another kind in one folder with a method: as an option of its config, in modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Beside:
    """What a method's files say of methods of another kind beside it.

    Attributes:
        option: PEFT's name of the option in `adapter_config.json`.
        method: name of the other method.
        module: PEFT's name of the module that holds the other method's tensors inside the adapted one.
        write: the option's value from the other methods, by the Hugging Face name of their sites.
        read: `(value, tied) -> (options, problems)`: the options of each of the other methods; `tied` says whether the
            language-model head is the embedding.
    """

    option: str
    method: str
    module: str
    write: Callable[[Mapping[str, Any]], Any]
    read: Callable[[Any, bool], tuple[list[dict[str, Any]], list[str]]]
