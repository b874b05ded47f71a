"""The `Method` type: a frozen dataclass of hyperparameters with pure functions over one site.

A method never sees the layer axis, a mesh or the train loop. It says, for one site of one layer,
which leaves it adds (`init`), how the site computes with them (`compute`), and how they fold into
the base (`fold`); `jaxpeft.core.rewriting`, `jaxpeft.core.interception` and `jaxpeft.core.folding`
lift that to a whole tree. What it does in training beside that is in `jaxpeft.core.training_hooks`,
how files call its leaves and options in its `PeftFormat`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.options import option, settle
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, SiteSpec
from jaxpeft.core.targets import Site, Targets
from jaxpeft.errors import ConfigError

if TYPE_CHECKING:
    import jax

Leaves = Mapping[str, Any]
Kernel = Callable[[], Any]
"""Gives a site's kernel, float32 `[in, out]` (of an embedding `[vocab, d]`), however it is stored.
"""


@dataclass(frozen=True)
class Call:
    """One call of one site while the model runs.

    Attributes:
        leaves: the adapter leaves of the site and those that its method keeps at the root of the
            tree, without a layer axis.
        args: what the module's method is called with; of a linear site one array, `[..., in]`.
        kwargs: the same, by name.
        base: the module's method without the adapter, `[..., in] -> [..., out]` of a linear site.
        kernel: gives the base's kernel, float32 `[in, out]`.
        bias: the base's bias `[out]`, None where it has none.
        dropout_key: makes a fresh key in a training call, None otherwise.
        rows: `[batch]` int32, which adapter of a stacked bank each row of a batch takes; None where
            there is one.
    """

    leaves: Leaves
    args: tuple[Any, ...]
    base: Callable[..., Any]
    kernel: Kernel
    bias: Any = None
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dropout_key: Callable[[], jax.Array] | None = None
    rows: Any = None

    @property
    def x(self) -> Any:
        """What a linear site is called with, `[..., in]`."""
        return self.args[0]

    def each(self, fn: Callable[..., Any], *arrays: Any) -> Any:
        """Compute `fn(leaves, *arrays)`; where each row of the batch has an adapter of its own, row
        by row.

        Args:
            fn: a pure function of adapter leaves and arrays.
            *arrays: with a leading batch axis.
        """
        if self.rows is None:
            return fn(self.leaves, *arrays)
        import jax

        own = {key: leaf[self.rows] for key, leaf in self.leaves.items()}
        return jax.vmap(fn)(own, *arrays)


@dataclass(frozen=True, kw_only=True)
class Method:
    """What every fine-tuning method is.

    Attributes:
        modules_to_save: names of modules trained and saved whole, beside what the method adds; the
            task head always is.

    Class attributes:
        name: its name in configs and files.
        paper: where it comes from.
        leaves: the leaves that it adds.
        sites: the modules that it can adapt, and the functions that compute them; by default
            `compute`.
        peft: how its adapters stand in files.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    leaves: ClassVar[LeafSpec] = LeafSpec()
    sites: ClassVar[SiteSpec] = SiteSpec()
    peft: ClassVar[PeftFormat[Any]] = PeftFormat()

    modules_to_save: tuple[str, ...] = option(
        (), "names of modules trained and saved whole, beside the adapter"
    )

    def __post_init__(self) -> None:
        found = settle(self, self.name)
        if found:
            raise ConfigError(found)

    def problems(self) -> list[str]:
        """List what is wrong across options, each as `field: why`."""
        return []

    def parts(self) -> tuple[Method, ...]:
        """Return the methods that this one is made of: itself, but for a method made of methods."""
        return (self,)

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output as it was, bit by bit."""
        return True

    # ---------------------------------------------------------------------------------------- sites

    def where(self, names: tuple[str, ...]) -> Targets | None:
        """Return the target options, or None for a method that adds no leaves to sites.

        Args:
            names: the Hugging Face names of all sites of the method's kinds, for defaults that
                depend on the model.
        """
        del names
        return None

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Check options that name sites, given the names of all adapted ones.

        Raises:
            TargetError: an option names a site that is not adapted.
        """
        del names

    # --------------------------------------------------------------------------------------- leaves

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Make the adapter leaves of one site of one layer, float32.

        Args:
            site: one layer of a site: `site.name` is its Hugging Face name, with the layer number.
            kernel: gives its kernel.
            rng: a key of its own.
        """
        raise NotImplementedError(
            f"{self.name} adds no leaves"
        )  # pragma: no cover - where() is None

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Make the leaves at the root of the tree, float32.

        Args:
            params: the base; abstract leaves will do.
            sites: that are adapted, one a layer.
            rng: a key of its own.
        """
        del params, sites, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether the method trains a leaf of the base or of its own.

        Args:
            path: of the leaf.
            params: the whole tree, rewritten; abstract leaves will do.

        Raises:
            ConfigError: the leaf is stacked, and some of its layers only would be trained.
        """
        del params
        return path[-1] in self.leaves.trained

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute a site with its adapter: `[..., in] -> [..., out]`."""
        return call.base(*call.args, **call.kwargs)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Fold the adapter leaves of one site of one layer into its base leaves.

        Args:
            leaves: the site's adapter leaves, and those at the root.
            base: its base leaves, float32; `kernel` is `[in, out]`, of an embedding `[vocab, d]`;
                and `original`, where another method's adapter is folded into that already: the
                kernel as it was, which `compute` sees.

        Returns:
            Those of the base leaves that are changed, float32.
        """
        del leaves
        return dict(base)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, with the method's name."""
        return {"name": self.name, **dataclasses.asdict(self)}
