"""The `Method` type: a frozen dataclass of hyperparameters with pure functions over one site.

A method never sees the layer axis, a mesh or the train loop. It says, for one site of one layer, which leaves it adds
(`init`), how the site computes with them (`compute`) and how they fold into the base (`fold`); the functions of
`jaxpeft.core.rewriting` and `jaxpeft.core.interception` lift that to a whole tree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.options import option, settle
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site, Targets
from jaxpeft.errors import ConfigError

if TYPE_CHECKING:
    import jax

Leaves = Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """One call of one site while the model runs.

    Attributes:
        leaves: the leaves of the site's own module, adapter leaves among them, without a layer axis.
        x: `[..., in]`, what the site is called with.
        base: computes the site without the adapter, `[..., in] -> [..., out]`.
        dropout_key: makes a fresh key in a training call, None otherwise.
    """

    leaves: Leaves
    x: jax.Array
    base: Callable[[jax.Array], jax.Array]
    dropout_key: Callable[[], jax.Array] | None


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every fine-tuning method is.

    Attributes:
        modules_to_save: names of modules trained and saved whole, beside what the method adds; the task head always is.

    Class attributes:
        name: its name in configs and files.
        leaf_names: the names of the leaves that it adds to a site, its marker first; a site that holds the marker
            computes with the method.
        trained_leaves: those of them that are trained.
    """

    name: ClassVar[str]
    leaf_names: ClassVar[tuple[str, ...]] = ()
    trained_leaves: ClassVar[frozenset[str]] = frozenset()

    modules_to_save: tuple[str, ...] = option((), "names of modules trained and saved whole, beside the adapter")

    def __post_init__(self) -> None:
        found = settle(self, self.name)
        if found:
            raise ConfigError(found)

    def problems(self) -> list[str]:
        """Lists what is wrong across options, each as `field: why`."""
        return []

    def where(self) -> Targets | None:
        """Gives the target options, or None for a method that adds no leaves."""
        return None

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Checks options that name sites, given the names of all adapted ones.

        Raises:
            TargetError: an option names a site that is not adapted.
        """
        del names

    def init(self, name: str, site: Site, base: Leaves, rng: jax.Array) -> dict[str, jax.Array]:
        """Makes the adapter leaves of one site of one layer, float32.

        Args:
            name: the Hugging Face name of the site, with its layer number.
            site: the site.
            base: its own leaves, for this layer.
            rng: a key of its own.
        """
        raise NotImplementedError(f"{self.name} adds no leaves")  # pragma: no cover - where() is None

    def trains(self, path: Path, siblings: Leaves) -> bool:
        """Says whether the method trains a leaf of the base or of its own.

        Args:
            path: of the leaf.
            siblings: the leaves of the same module.
        """
        del siblings
        return path[-1] in self.trained_leaves

    @staticmethod
    def compute(call: Call) -> jax.Array:
        """Computes a site with its adapter: `[..., in] -> [..., out]`."""
        return call.base(call.x)

    @staticmethod
    def fold(leaves: Leaves) -> dict[str, Any]:
        """Folds the adapter leaves of a module into its base leaves, in float32; a leading layer axis is allowed."""
        return dict(leaves)
