"""The base class of methods that train the base's own leaves at chosen sites."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from jaxpeft.core import paths
from jaxpeft.core.method import Kernel, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.core.targets import ALL, Site, Targets, matches, selects_leaf
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat

if TYPE_CHECKING:
    import jax


M = TypeVar("M", bound="Selected")


@dataclass(frozen=True)
class SelectedFormat(TargetedFormat[M]):
    """The file format of `Selected` adapters."""

    def wrapper(self, method: M, path: Path, by: Method | None) -> str:
        """Return no infix: the module keeps its own names."""
        del path, by
        return ""


@dataclass(frozen=True, kw_only=True)
class Selected(Targeted):
    """A method that trains the base's leaves with the names `base_leaves` at chosen sites.

    Class attributes:
        base_leaves: names of the trained leaves.
    """

    sites: ClassVar[SiteSpec] = SiteSpec(
        kinds=("linear", "norm"),
    )
    peft: ClassVar[PeftFormat[Any]] = SelectedFormat(
        options=TARGET_OPTIONS,
    )

    base_leaves: ClassVar[frozenset[str]] = frozenset()

    targets: str | tuple[str, ...] = option(
        ALL, "list of name suffixes, a regular expression, or 'all'"
    )

    def target_options(self) -> Targets:
        """Return the target options; an entry that matches no site of the model selects nothing."""
        return self.where(self.usual_targets)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Return no leaves."""
        del site, kernel, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether a leaf belongs to a selected site."""
        if path[-1] not in self.base_leaves or paths.is_head(path):
            return False
        return selects_leaf(
            self.name,
            path,
            paths.get(params, path),
            lambda name: matches(name, self.target_options()),
        )
