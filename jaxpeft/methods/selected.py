"""What the methods that train leaves of the base at chosen sites, and add none, have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from jaxpeft.core import paths
from jaxpeft.core.method import Kernel, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.core.targets import ALL, Site, Targets, matches, whole_leaf
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat

if TYPE_CHECKING:
    import jax


M = TypeVar("M", bound="Selected")


@dataclass(frozen=True)
class SelectedFormat(TargetedFormat[M]):
    """How adapters of `Selected` stand in files."""

    def wrapper(self, method: M, path: Path, by: Method | None) -> str:
        """Keep the module's own names: nothing stands around it."""
        del path, by
        return ""


@dataclass(frozen=True, kw_only=True)
class Selected(Targeted):
    """A method that trains leaves of the base, those of the names `base_leaves`, at chosen sites.

    Class attributes:
        base_leaves: the names of the leaves that are trained.
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

    def wanted(self) -> Targets:
        """Return the target options, without a look at the model: an entry that it has not selects
        nothing.
        """
        return self.where(self.usual_targets)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Add nothing."""
        del site, kernel, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Train the leaves of the selected sites."""
        if path[-1] not in self.base_leaves or paths.is_head(path):
            return False
        return whole_leaf(
            self.name, path, paths.get(params, path), lambda name: matches(name, self.wanted())
        )
