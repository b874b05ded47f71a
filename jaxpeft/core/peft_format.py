"""How the adapters of a method stand in files of Hugging Face PEFT, or of the library that has the
method.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site
from jaxpeft.errors import show

if TYPE_CHECKING:
    from jaxpeft.core.method import Method

Leaves = Mapping[str, Any]
M = TypeVar("M", bound="Method")
F = TypeVar("F", bound="PeftFormat[Any]")


@dataclass(frozen=True)
class Beside:
    """What a method's files say of methods of another kind beside it.

    Attributes:
        option: PEFT's name of the option in `adapter_config.json`.
        method: name of the other method.
        module: PEFT's name of the module that holds the other method's tensors inside the adapted
            one.
        write: the option's value from the other methods, by the Hugging Face name of their sites.
        read: `(value, tied) -> (options, problems)`: the options of each of the other methods;
            `tied` says whether the language-model head is the embedding.
    """

    option: str
    method: str
    module: str
    write: Callable[[Mapping[str, Any]], Any]
    read: Callable[[Any, bool], tuple[list[dict[str, Any]], list[str]]]


@dataclass(frozen=True)
class PeftFormat(Generic[M]):
    """The names of a method's options and leaves in files, and how they are written and read;
    `hub/` alone uses it.

    Attributes:
        type: `peft_type` of `adapter_config.json`, None where PEFT has no such method.
        options: from PEFT's names of options to the method's.
        required: those of PEFT's names without which a file cannot be read, as defaults differ.
        ignored: PEFT's names of options that say nothing of what a trained adapter computes, such
            as how it began, or that `read_options` reads itself.
        tensors: from a leaf's name to its tensor's; a leaf of two axes is stored as its transpose.
        untransposed: those leaves that are not: whose axes stand in files as they do here.
        root_tensors: the same as `tensors` for leaves at the root.
        module_prefix: what the names of the base's modules begin with.
        beside: how files hold methods of another kind beside this one, None where they cannot.
        layout: of adapter folders: `peft`, or a key of `jaxpeft.hub.adapters.folders.LAYOUTS` for
            the files of another library.
    """

    type: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    required: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    untransposed: frozenset[str] = frozenset()
    root_tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    module_prefix: str = "base_model.model."
    beside: Beside | None = None
    layout: str = "peft"

    def replace(self, cls: type[F], **changes: Any) -> F:
        """Return a format of another class with the same attributes but for the changes."""
        return cls(
            **{one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | changes
        )

    # -------------------------------------------------------------------------------------- tensors

    def pack(self, method: M, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the tensors of one site of one layer, by the end of their names.

        Args:
            method: that adapts it.
            site: one layer of a site.
            leaves: its adapter leaves, without padding.
        """
        del method, site
        return {
            self.tensors[key]: self._transposed(key, leaf)
            for key, leaf in leaves.items()
            if key in self.tensors
        }

    def unpack(self, method: M, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the adapter leaves that `pack` would pack like this.

        Args:
            method: that adapts the site.
            site: one layer of a site.
            tensors: by the end of their names.
            fresh: the leaves as `init` made them; what no file holds stays so.
        """
        del method, site
        held = {
            key: self._transposed(key, tensors[name])
            for key, name in self.tensors.items()
            if name in tensors
        }
        return {**fresh, **held}

    def wrong_numbers(self, method: M, site: Site, tensors: Leaves) -> list[str]:
        """Return what cannot be in the tensors of a file, each as `name: why`.

        Args:
            method: that adapts the site.
            site: one layer of a site.
            tensors: by the end of their names, finite and of the shapes that `pack` gives.
        """
        del method, site, tensors
        return []

    def pack_root(self, method: M, leaves: Leaves) -> dict[str, Any]:
        """Return the tensors of the leaves at the root, by name."""
        del method
        return {
            self.root_tensors[key]: self._transposed(key, leaf)
            for key, leaf in leaves.items()
            if key in self.root_tensors
        }

    def unpack_root(self, method: M, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the leaves at the root that `pack_root` would pack like this."""
        del method
        held = {
            key: self._transposed(key, tensors[name])
            for key, name in self.root_tensors.items()
            if name in tensors
        }
        return {**fresh, **held}

    def _transposed(self, key: str, leaf: Any) -> Any:
        """Turn a leaf into the tensor of a file, and back: `[in, out]` here is `[out, in]`
        there.
        """
        return leaf.T if leaf.ndim == 2 and key not in self.untransposed else leaf

    def wrapper(self, method: M, path: Path, by: Method | None) -> str:
        """Return what stands in a file between the name of a module and that of a leaf of the base
        that is trained.

        Args:
            method: whose file it is.
            path: of the leaf.
            by: which of the method's parts adapts its module: PEFT keeps the module itself inside
                another then.
        """
        del method, path
        return "base_layer." if by else ""

    # -------------------------------------------------------------------------------------- options

    def names(self, kind: type[M]) -> Mapping[str, str]:
        """Return the method's options by what `adapter_config.json` calls them: where PEFT has no
        such method, as they are.
        """
        if self.type is not None:
            return self.options
        fields = dataclasses.fields(kind)
        return {one.name: one.name for one in fields if one.name != "modules_to_save"}

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options as `adapter_config.json` has them, those in common to all methods
        apart.
        """
        return {peft: getattr(method, ours) for peft, ours in self.names(type(method)).items()}

    def base_sizes(self, method: M, params: Leaves, config: Any) -> dict[str, Any]:
        """Return what `adapter_config.json` says of the base beside the options.

        Args:
            method: whose file it is.
            params: the rewritten tree; abstract leaves will do.
            config: the model's, whose names are those of its `config.json`.
        """
        del method, params, config
        return {}

    def reads(self, kind: type[M], config: Mapping[str, Any]) -> bool:
        """Return whether an `adapter_config.json` is one of a method's."""
        return str(config.get("peft_type")) == (self.type or kind.name.upper())

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read `adapter_config.json`.

        Args:
            kind: the class of the method.
            config: the file's content, without the fields that all methods have in common.

        Returns:
            `(options, problems)`: what is set and not supported is a problem.
        """
        options = self.names(kind)
        values = {
            ours: config[peft] for peft, ours in options.items() if config.get(peft) is not None
        }
        known = options.keys() | self.ignored
        rest = {key: value for key, value in config.items() if key not in known and value}
        missing = [key for key in self.required if config.get(key) is None]
        name: str = kind.name
        return values, [
            *(
                f"{key}: {show(value)} is not supported by the {name} method; nothing was loaded"
                for key, value in rest.items()
            ),
            *(f"{key}: is not set; take it from where the adapter was trained" for key in missing),
        ]

    def fit(self, method: M, shapes: Mapping[str, tuple[int, ...]]) -> M:
        """Return the method that the tensors of a file are of, where its options may say another.

        Args:
            method: as the options say.
            shapes: of the tensors, by name.
        """
        del shapes
        return method
