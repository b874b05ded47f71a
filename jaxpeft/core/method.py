"""The `Method` type: a frozen dataclass of hyperparameters with pure functions over one site.

A method never sees the layer axis, a mesh or the train loop. It says, for one site of one layer, which leaves it adds
(`init`), how the site computes with them (`compute`), how they fold into the base (`fold`) and how files call them (`pack`,
`unpack`); the functions of `jaxpeft.core.rewriting`, `jaxpeft.core.interception` and `jaxpeft.hub.adapter_tensors` lift that
to a whole tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.beside import Beside
from jaxpeft.core.options import option, settle
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site, Targets
from jaxpeft.errors import ConfigError, shown

if TYPE_CHECKING:
    import jax
    import optax

Leaves = Mapping[str, Any]
Kernel = Callable[[], Any]
"""Gives a site's kernel, float32 `[in, out]` (of an embedding `[vocab, d]`), however it is stored."""


@dataclass(frozen=True)
class Call:
    """One call of one site while the model runs.

    Attributes:
        leaves: the adapter leaves of the site and those that its method keeps at the root of the tree, without a layer axis.
        args: what the module's method is called with; of a linear site one array, `[..., in]`.
        kwargs: the same, by name.
        base: the module's method without the adapter, `[..., in] -> [..., out]` of a linear site.
        kernel: gives the base's kernel, float32 `[in, out]`.
        bias: the base's bias `[out]`, None where it has none.
        dropout_key: makes a fresh key in a training call, None otherwise.
        rows: `[batch]` int32, which adapter of a stacked bank each row of a batch takes; None where there is one.
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
        """Computes `fn(leaves, *arrays)`; where each row of the batch has an adapter of its own, row by row.

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
        modules_to_save: names of modules trained and saved whole, beside what the method adds; the task head always is.

    Class attributes:
        name: its name in configs and files.
        paper: where it comes from.
        leaf_names: the names of the leaves that it adds to a site, its marker first; a site that holds the marker
            computes with the method.
        root_names: the names of the leaves that it adds at the root of the tree: what sites share, or what the whole model
            computes with.
        trained_leaves: those of them that are trained.
        head_alone: whether it trains nothing but the head and `modules_to_save`.
        kinds: of sites that it can adapt: `linear`, `embedding`, `norm`.
        hooks: which methods of a module it computes, and by which of its own functions.
        mergeable: whether `fold` gives plain leaves that compute the same.
        fresh_is_base: whether a fresh adapter leaves every output as it was, bit by bit.
        zero_is_base: whether leaves of zeros compute the base, and stay zero in training: how stacked layers that are not
            adapted are padded. Where not, a leaf beside them says which layers are.
        pads: whether zeros behind its leaves add nothing and stay zero in training: how stacked layers whose leaves differ in
            size are padded.
        rank_pads: whether leaves of two adapters that differ in shape differ in rank alone, so that zeros make them alike.
        peft_type: of Hugging Face PEFT's `adapter_config.json`, None where PEFT has no such method.
        peft_options: from PEFT's names of options to the method's.
        peft_required: those of PEFT's names without which a file cannot be read, as defaults differ.
        peft_ignored: PEFT's names of options that say nothing of what a trained adapter computes, such as how it began, or
            that the method's own `from_peft` reads.
        files: from a leaf's name to its tensor's in an adapter file; a leaf of two axes is stored as its transpose.
        as_they_are: those leaves that are not: whose axes stand in files as they do here.
        root_files: the same for leaves at the root.
        module_prefix: what the names of the base's modules begin with in an adapter file.
        beside: how files hold methods of another kind beside this one, None where they cannot.
        layout: of adapter folders: `peft`, or a key of `jaxpeft.hub.adapters.LAYOUTS` for the files of another library.
        needed_inputs: what a module's method must take by name, beside its own inputs, to be computed by this one.
    """

    name: ClassVar[str]
    paper: ClassVar[str] = ""
    leaf_names: ClassVar[tuple[str, ...]] = ()
    root_names: ClassVar[tuple[str, ...]] = ()
    trained_leaves: ClassVar[frozenset[str]] = frozenset()
    head_alone: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    hooks: ClassVar[Mapping[str, str]] = {"__call__": "compute"}
    mergeable: ClassVar[bool] = True
    fresh_is_base: ClassVar[bool] = True
    zero_is_base: ClassVar[bool] = True
    pads: ClassVar[bool] = True
    rank_pads: ClassVar[bool] = True
    peft_type: ClassVar[str | None] = None
    peft_options: ClassVar[Mapping[str, str]] = {}
    peft_required: ClassVar[tuple[str, ...]] = ()
    peft_ignored: ClassVar[frozenset[str]] = frozenset()
    files: ClassVar[Mapping[str, str]] = {}
    as_they_are: ClassVar[frozenset[str]] = frozenset()
    root_files: ClassVar[Mapping[str, str]] = {}
    module_prefix: ClassVar[str] = "base_model.model."
    needed_inputs: ClassVar[tuple[str, ...]] = ()
    beside: ClassVar[Beside | None] = None
    layout: ClassVar[str] = "peft"

    modules_to_save: tuple[str, ...] = option((), "names of modules trained and saved whole, beside the adapter")

    def __post_init__(self) -> None:
        found = settle(self, self.name)
        if found:
            raise ConfigError(found)

    def problems(self) -> list[str]:
        """Lists what is wrong across options, each as `field: why`."""
        return []

    def parts(self) -> tuple[Method, ...]:
        """Gives the methods that this one is made of: itself, but for a method made of methods."""
        return (self,)

    @property
    def virtual_positions(self) -> int:
        """How many positions it takes in front of a row's tokens."""
        return 0

    # ------------------------------------------------------------------------------------------------------------- sites

    @classmethod
    def site_names(cls) -> tuple[str, ...]:
        """Gives the names of all leaves that a site may hold, that which says which layers are adapted among them."""
        return (*cls.leaf_names, f"{cls.leaf_names[0]}_on") if cls.leaf_names else ()

    def where(self, names: tuple[str, ...]) -> Targets | None:
        """Gives the target options, or None for a method that adds no leaves to sites.

        Args:
            names: the Hugging Face names of all sites of the method's kinds, for defaults that depend on the model.
        """
        del names
        return None

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Checks options that name sites, given the names of all adapted ones.

        Raises:
            TargetError: an option names a site that is not adapted.
        """
        del names

    # ------------------------------------------------------------------------------------------------------------ leaves

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Makes the adapter leaves of one site of one layer, float32.

        Args:
            site: one layer of a site: `site.name` is its Hugging Face name, with the layer number.
            kernel: gives its kernel.
            rng: a key of its own.
        """
        raise NotImplementedError(f"{self.name} adds no leaves")  # pragma: no cover - where() is None

    def init_root(self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array) -> dict[str, jax.Array]:
        """Makes the leaves at the root of the tree, float32.

        Args:
            params: the base; abstract leaves will do.
            sites: that are adapted, one a layer.
            rng: a key of its own.
        """
        del params, sites, rng
        return {}

    def trains(self, path: Path, params: Leaves) -> bool:
        """Says whether the method trains a leaf of the base or of its own.

        Args:
            path: of the leaf.
            params: the whole tree, rewritten; abstract leaves will do.

        Raises:
            ConfigError: the leaf is stacked, and some of its layers only would be trained.
        """
        del params
        return path[-1] in self.trained_leaves

    @classmethod
    def computes(cls, module: Any, name: str) -> bool:
        """Says whether the method computes a module's method, by the function that `hooks` gives.

        Args:
            module: a Linen or an NNX module that holds the marker leaf.
            name: of its method.
        """
        del module
        return name in cls.hooks

    @staticmethod
    def compute(call: Call) -> Any:
        """Computes a site with its adapter: `[..., in] -> [..., out]`."""
        return call.base(*call.args, **call.kwargs)

    @staticmethod
    def low_rank_factors(leaves: Leaves, training: bool) -> tuple[Any, Any] | None:
        """Gives `A [in, r]` and `B [r, out]` of a linear site where `compute` is `x W + x A B`: see `jaxpeft.kernels.joint`.

        Args:
            leaves: as `compute` is given them.
            training: whether it is a training call.

        Returns:
            None where `compute` is anything else.
        """
        del leaves, training

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Folds the adapter leaves of one site of one layer into its base leaves.

        Args:
            leaves: the site's adapter leaves, and those at the root.
            base: its base leaves, float32; `kernel` is `[in, out]`, of an embedding `[vocab, d]`; and `original`, where another
                method's adapter is folded into that already: the kernel as it was, which `compute` sees.

        Returns:
            Those of the base leaves that are changed, float32.
        """
        del leaves
        return dict(base)

    # ---------------------------------------------------------------------------------------------------------- training

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Gives an adapter its start from data, where the method asks for that; nothing of it is done again on resuming.

        Args:
            params: the rewritten tree.
            run: model, tokenizer and batches: a `jaxpeft.training.start.Start`.

        Returns:
            `(method, params)`: the method, whose options may depend on the data, and the tree.
        """
        del run
        return self, params

    def penalty(self, trainable: Leaves) -> Any:
        """Gives what is added to the mean loss: a float32 scalar, or None.

        Args:
            trainable: the trained part of the tree.
        """
        del trainable
        return None

    def rate(self, path: Path) -> float:
        """Gives the learning rate of a trained leaf as a multiple of the others'."""
        del path
        return 1.0

    def optimizer(self, inner: optax.GradientTransformation, steps: int) -> optax.GradientTransformation:
        """Wraps the optimizer, for a method whose update is not that of the gradient alone.

        Args:
            inner: the optimizer, over the trained part of the tree.
            steps: of the whole run.
        """
        del steps
        return inner

    # ------------------------------------------------------------------------------------------------------------- files

    def pack(self, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Gives the tensors of one site of one layer as adapter files have them, by the end of their names.

        Args:
            site: one layer of a site.
            leaves: its adapter leaves, without padding.
        """
        del site
        return {self.files[key]: self._torch(key, leaf) for key, leaf in leaves.items() if key in self.files}

    def fitted(self, shapes: Mapping[str, tuple[int, ...]]) -> Method:
        """Return the method that the tensors of a file are of, where its options may say another.

        Args:
            shapes: of the tensors, by name.
        """
        del shapes
        return self

    def unpack(self, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Gives the adapter leaves that `pack` would pack like this.

        Args:
            site: one layer of a site.
            tensors: by the end of their names.
            fresh: the leaves as `init` made them; what no file holds stays so.
        """
        del site
        held = {key: self._torch(key, tensors[name]) for key, name in self.files.items() if name in tensors}
        return {**fresh, **held}

    def wrong_numbers(self, site: Site, tensors: Leaves) -> list[str]:
        """Lists what cannot be in the tensors of a file, each as `name: why`.

        Args:
            site: one layer of a site.
            tensors: by the end of their names, finite and of the shapes that `pack` gives.
        """
        del site, tensors
        return []

    def pack_root(self, leaves: Leaves) -> dict[str, Any]:
        """Gives the tensors of the leaves at the root, by name."""
        return {self.root_files[key]: self._torch(key, leaf) for key, leaf in leaves.items() if key in self.root_files}

    def unpack_root(self, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Gives the leaves at the root that `pack_root` would pack like this."""
        held = {key: self._torch(key, tensors[name]) for key, name in self.root_files.items() if name in tensors}
        return {**fresh, **held}

    def _torch(self, key: str, leaf: Any) -> Any:
        """Turns a leaf to the tensor of a file, and back: `[in, out]` here is `[out, in]` there."""
        return leaf.T if leaf.ndim == 2 and key not in self.as_they_are else leaf

    def wrapping(self, path: Path, by: Method | None) -> str:
        """Gives what stands in a file between the name of a module and that of a leaf of the base that is trained.

        Args:
            path: of the leaf.
            by: which of the method's parts adapts its module: PEFT keeps the module itself inside another then.
        """
        del path
        return "base_layer." if by else ""

    def to_peft(self) -> dict[str, Any]:
        """Gives the options as `adapter_config.json` has them, those in common to all methods apart."""
        return {peft: getattr(self, ours) for peft, ours in self.file_options().items()}

    def peft_sizes(self, params: Leaves, config: Any) -> dict[str, Any]:
        """Gives what `adapter_config.json` says of the base beside the options.

        Args:
            params: the rewritten tree; abstract leaves will do.
            config: the model's, whose names are those of its `config.json`.
        """
        del params, config
        return {}

    @classmethod
    def file_options(cls) -> Mapping[str, str]:
        """Gives the method's options by what `adapter_config.json` calls them: where PEFT has no such method, as they are."""
        if cls.peft_type is not None:
            return cls.peft_options
        return {f.name: f.name for f in dataclasses.fields(cls) if f.name != "modules_to_save"}

    @classmethod
    def reads(cls, config: Mapping[str, Any]) -> bool:
        """Says whether an `adapter_config.json` is one of this method's."""
        return str(config.get("peft_type")) == (cls.peft_type or cls.name.upper())

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Reads `adapter_config.json`.

        Args:
            config: its content, without the fields that all methods have in common.

        Returns:
            `(options, problems)`: what is set and not supported is a problem.
        """
        options = cls.file_options()
        values = {ours: config[peft] for peft, ours in options.items() if config.get(peft) is not None}
        known = options.keys() | cls.peft_ignored
        rest = {key: value for key, value in config.items() if key not in known and value}
        missing = [key for key in cls.peft_required if config.get(key) is None]
        return values, [
            *(
                f"{key}: {shown(value)} is not supported by the {cls.name} method; nothing was loaded"
                for key, value in rest.items()
            ),
            *(f"{key}: is not set; take it from where the adapter was trained" for key in missing),
        ]

    # ------------------------------------------------------------------------------------------------------------ plainly

    def as_dict(self) -> dict[str, Any]:
        """Gives the options as plain values, with the method's name."""
        return {"name": self.name, **dataclasses.asdict(self)}
