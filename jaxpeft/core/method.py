"""The `Method` type: a frozen dataclass of hyperparameters with pure functions over one site.

A method does not depend on the layer axis, the mesh or the train loop. For one site of one layer it
defines which leaves it adds (`init`), how the site computes with them (`compute`), and how they
fold into the base (`fold`); `jaxpeft.core.rewriting`, `jaxpeft.core.interception` and
`jaxpeft.core.folding` lift that to a tree. Optional behavior in training is in
`jaxpeft.core.training_hooks`, and the names of its leaves and options in files in its `PeftFormat`.
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
"""Returns a site's kernel, float32 `[in, out]` (`[vocab, d]` for an embedding), however stored."""


@dataclass(frozen=True)
class Call:
    """One call of one site while the model runs.

    Attributes:
        leaves: adapter leaves of the site and of its method at the root of the tree, without a
            layer axis.
        args: positional arguments of the module's method; for a linear site one array, `[..., in]`.
        kwargs: its keyword arguments.
        base: the module's method without the adapter, `[..., in] -> [..., out]` for a linear site.
        kernel: returns the base's kernel, float32 `[in, out]`.
        bias: the base's bias `[out]`, or None.
        dropout_key: makes a fresh key in a training call; None otherwise.
        rows: `[batch]` int32, adapter index of each row of a multi-adapter batch; None otherwise.
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
        """The input of a linear site, `[..., in]`."""
        return self.args[0]

    def each(self, fn: Callable[..., Any], *arrays: Any) -> Any:
        """Compute `fn(leaves, *arrays)`, per row with its own leaves in a multi-adapter batch.

        Args:
            fn: a pure function of adapter leaves and arrays.
            *arrays: arrays with a leading batch axis.
        """
        if self.rows is None:
            return fn(self.leaves, *arrays)
        import jax
        import jax.numpy as jnp

        own = {key: leaf[self.rows] for key, leaf in self.leaves.items()}
        rows = len(self.rows)
        # an input that all rows share, such as a table of positions, has a batch axis of 1
        each = (
            jnp.broadcast_to(x, (rows, *x.shape[1:])) if x.shape[0] == 1 and rows > 1 else x
            for x in arrays
        )
        return jax.vmap(fn)(own, *each)


@dataclass(frozen=True, kw_only=True)
class Method:
    """The base class of all fine-tuning methods.

    Attributes:
        modules_to_save: names of modules that are fully trained and saved in addition to the
            adapter; the task head always is.

    Class attributes:
        name: its name in configs and files.
        paper: citation.
        leaves: the leaves that it adds.
        sites: the modules that it can adapt, and the functions that compute them; `compute` by
            default.
        peft: the file format of its adapters.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    leaves: ClassVar[LeafSpec] = LeafSpec()
    sites: ClassVar[SiteSpec] = SiteSpec()
    peft: ClassVar[PeftFormat[Any]] = PeftFormat()

    modules_to_save: tuple[str, ...] = option(
        (), "names of modules that are fully trained and saved in addition to the adapter"
    )

    def __post_init__(self) -> None:
        problems = settle(self, self.name)
        if problems:
            raise ConfigError(problems)

    def problems(self) -> list[str]:
        """List the errors that involve several options, each as `field: why`."""
        return []

    def parts(self) -> tuple[Method, ...]:
        """Return the parts of a mixed method; only itself for any other method."""
        return (self,)

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical, operation by operation."""
        return True

    # ---------------------------------------------------------------------------------------- sites

    def where(self, names: tuple[str, ...]) -> Targets | None:
        """Return the target options, or None for a method that adds no leaves to sites.

        Args:
            names: Hugging Face names of all sites of the method's kinds, for defaults that depend
                on the model.
        """
        del names
        return None

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Check options that name sites against the names of all adapted sites.

        Raises:
            TargetError: An option names a site that is not adapted.
        """
        del names

    # --------------------------------------------------------------------------------------- leaves

    def over(self, sites: tuple[Site, ...]) -> Method:
        """Return the method as it initializes these sites; itself if they do not depend on each
        other.

        Args:
            sites: the adapted sites, one per layer.
        """
        del sites
        return self

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize the float32 adapter leaves of one site of one layer.

        Args:
            site: one layer of a site; `site.name` is its Hugging Face name with the layer number.
            kernel: returns its kernel.
            rng: a key for this site and layer only.
        """
        raise NotImplementedError(
            f"{self.name} adds no leaves"
        )  # pragma: no cover - where() is None

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Initialize the float32 leaves at the root of the tree.

        Args:
            params: the base; its leaves may be abstract.
            sites: the adapted sites, one per layer.
            rng: a key for these leaves only.
        """
        del params, sites, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether the method trains a leaf of the base or of the adapter.

        Args:
            path: path of the leaf.
            params: the rewritten tree; its leaves may be abstract.

        Raises:
            ConfigError: The leaf is stacked, and only some of its layers would be trained.
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
            leaves: adapter leaves of the site and at the root.
            base: its float32 base leaves; `kernel` is `[in, out]`, or `[vocab, d]` for an
                embedding. If another adapter is already folded into it, `original` is the original
                kernel, which `compute` uses.

        Returns:
            The changed base leaves, float32.
        """
        del leaves
        return dict(base)

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values, with the method's name."""
        return {"name": self.name, **dataclasses.asdict(self)}
