"""What the methods that train leaves of the base at chosen sites, and add none, have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from jaxpeft.core import paths
from jaxpeft.core.method import Kernel, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import ALL, Site, Targets, matches, whole_leaf
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True, kw_only=True)
class Selected(Targeted):
    """A method that trains leaves of the base, those of the names `base_leaves`, at chosen sites.

    Class attributes:
        base_leaves: the names of the leaves that are trained.
    """

    kinds: ClassVar[tuple[str, ...]] = ("linear", "norm")
    base_leaves: ClassVar[frozenset[str]] = frozenset()
    peft_options: ClassVar[Mapping[str, str]] = TARGET_OPTIONS

    targets: str | tuple[str, ...] = option(ALL, "list of name suffixes, a regular expression, or 'all'")

    def wanted(self) -> Targets:
        """Gives the target options, without a look at the model: an entry that it has not selects nothing."""
        return self.where(self.usual_targets)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Adds nothing."""
        del site, kernel, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Trains the leaves of the selected sites."""
        if path[-1] not in self.base_leaves or paths.is_head(path):
            return False
        return whole_leaf(self.name, path, paths.get(params, path), lambda name: matches(name, self.wanted()))

    def wrapping(self, path: Path, by: Method | None) -> str:
        """Keeps the module's own names: nothing stands around it."""
        del path, by
        return ""
