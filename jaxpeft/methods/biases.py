"""The base class of methods with PEFT's option `bias`, which also train biases of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxpeft.core import paths
from jaxpeft.core.method import Leaves
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import matches, selects_leaf
from jaxpeft.methods.targeted import Targeted


def bias_option() -> Any:
    """Declare the option `bias`; its type in each method has PEFT's values: `none`, `all`, and
    `NAME_only`.
    """
    return option("none", "biases of the base that are also trained")


@dataclass(frozen=True, kw_only=True)
class Biased(Targeted):
    """A targeted method with an option `bias`: `none`, `all`, or `..._only` for the biases of its
    sites.
    """

    if TYPE_CHECKING:
        bias: str = bias_option()  # a field of each method, at its own place among the options

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether a leaf is a trained adapter leaf, or a bias selected by `bias`.

        Raises:
            ConfigError: The leaf is a stacked bias, and only some of its layers are adapted.
        """
        return super().trains(path, params) or (
            path[-1] == "bias" and self._trains_bias(path, params)
        )

    def _trains_bias(self, path: Path, params: Leaves) -> bool:
        if self.bias in ("none", "all"):
            return self.bias == "all"
        adapted, wanted = self.leaves.site[0] in paths.get(params, path[:-1]), self.where(())
        return adapted and selects_leaf(
            self.name, path, paths.get(params, path), lambda name: matches(name, wanted)
        )
