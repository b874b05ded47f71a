"""The file format of a method's adapters, in Hugging Face PEFT or another library."""

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
class Companion:
    """An additional method that a method's files can store.

    Attributes:
        option: PEFT's name of the option in `adapter_config.json`.
        method: name of the additional method.
        module: PEFT's name of the submodule with the additional method's tensors.
        write: returns the option's value from the additional methods, by their sites' Hugging Face
            names.
        read: `(value, tied) -> (options, problems)`: returns the options of each additional
            method; `tied` is whether the language-model head is tied to the embedding.
    """

    option: str
    method: str
    module: str
    write: Callable[[Mapping[str, Any]], Any]
    read: Callable[[Any, bool], tuple[list[dict[str, Any]], list[str]]]


@dataclass(frozen=True)
class PeftFormat(Generic[M]):
    """The names of a method's options and leaves in files, and their conversion; used by `hub/`.

    Attributes:
        type: `peft_type` in `adapter_config.json`; None if PEFT does not have the method.
        options: maps PEFT's option names to the method's.
        required: PEFT's names of options that a file must contain, because defaults differ.
        ignored: PEFT's names of options that do not affect a trained adapter, such as its
            initialization, or that `read_options` handles.
        refused: PEFT's names of options that the method cannot support, with the reason.
        tensors: maps leaf names to tensor names; a leaf with two axes is stored transposed.
        untransposed: names of leaves that are not stored transposed.
        root_tensors: like `tensors`, for leaves at the root.
        module_prefix: prefix of the base's module names.
        companion: how files store an additional method; None if they cannot.
        layout: layout of adapter folders: `peft`, or another key of
            `jaxpeft.hub.adapters.layouts.LAYOUTS`.
    """

    type: str | None = None
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    required: tuple[str, ...] = ()
    ignored: frozenset[str] = frozenset()
    refused: Mapping[str, str] = field(default_factory=dict[str, str])
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    untransposed: frozenset[str] = frozenset()
    root_tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    module_prefix: str = "base_model.model."
    companion: Companion | None = None
    layout: str = "peft"

    def replace(self, cls: type[F], **changes: Any) -> F:
        """Return a format of another class with the same attributes, except for the changes."""
        return cls(
            **{one.name: getattr(self, one.name) for one in dataclasses.fields(self)} | changes
        )

    # -------------------------------------------------------------------------------------- tensors

    def pack(self, method: M, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the tensors of one site of one layer, by name suffix.

        Args:
            method: the method that adapts it.
            site: one layer of a site.
            leaves: its adapter leaves, without padding.
        """
        del method, site
        return {
            self.tensors[key]: self._transpose(key, leaf)
            for key, leaf in leaves.items()
            if key in self.tensors
        }

    def unpack(self, method: M, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the adapter leaves for packed tensors; the inverse of `pack`.

        Args:
            method: the method that adapts the site.
            site: one layer of a site.
            tensors: the tensors by name suffix.
            fresh: the leaves from `init`; leaves that are not stored in files keep these values.
        """
        del method, site
        held = {
            key: self._transpose(key, tensors[name])
            for key, name in self.tensors.items()
            if name in tensors
        }
        return {**fresh, **held}

    def wrong_numbers(self, method: M, site: Site, tensors: Leaves) -> list[str]:
        """List invalid values in the tensors of a file, each as `name: why`.

        Args:
            method: the method that adapts the site.
            site: one layer of a site.
            tensors: the tensors by name suffix, finite and with the shapes from `pack`.
        """
        del method, site, tensors
        return []

    def pack_root(self, method: M, leaves: Leaves) -> dict[str, Any]:
        """Return the tensors of the leaves at the root, by name."""
        del method
        return {
            self.root_tensors[key]: self._transpose(key, leaf)
            for key, leaf in leaves.items()
            if key in self.root_tensors
        }

    def unpack_root(self, method: M, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the leaves at the root for packed tensors; the inverse of `pack_root`."""
        del method
        held = {
            key: self._transpose(key, tensors[name])
            for key, name in self.root_tensors.items()
            if name in tensors
        }
        return {**fresh, **held}

    def _transpose(self, key: str, leaf: Any) -> Any:
        """Convert between a leaf `[in, out]` and the tensor of a file `[out, in]`."""
        return leaf.T if leaf.ndim == 2 and key not in self.untransposed else leaf

    def wrapper(self, method: M, path: Path, by: Method | None) -> str:
        """Return the infix between the names of a module and of its trained base leaf in a file.

        Args:
            method: method of the file.
            path: path of the leaf.
            by: the part that adapts the leaf's module, if any: PEFT then wraps the module.
        """
        del method, path
        return "base_layer." if by else ""

    # -------------------------------------------------------------------------------------- options

    def names(self, kind: type[M]) -> Mapping[str, str]:
        """Map option names in `adapter_config.json` to the method's; the same if not in PEFT."""
        if self.type is not None:
            return self.options
        fields = dataclasses.fields(kind)
        return {one.name: one.name for one in fields if one.name != "modules_to_save"}

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options for `adapter_config.json`, without those common to all methods."""
        return {peft: getattr(method, ours) for peft, ours in self.names(type(method)).items()}

    def base_sizes(self, method: M, params: Leaves, config: Any) -> dict[str, Any]:
        """Return further fields of `adapter_config.json` that describe the base.

        Args:
            method: method of the file.
            params: the rewritten tree; its leaves may be abstract.
            config: config of the model, with the names of its `config.json`.
        """
        del method, params, config
        return {}

    def reads(self, kind: type[M], config: Mapping[str, Any]) -> bool:
        """Return whether an `adapter_config.json` belongs to a method."""
        return str(config.get("peft_type")) == (self.type or kind.name.upper())

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read `adapter_config.json`.

        Args:
            kind: the class of the method.
            config: the file's content, without the fields common to all methods.

        Returns:
            `(options, problems)`, with a problem for each unsupported setting.
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
                + (f"; {self.refused[key]}" if key in self.refused else "")
                for key, value in rest.items()
            ),
            *(f"{key}: is not set; use the value of the adapter's training" for key in missing),
        ]

    def fit(self, method: M, shapes: Mapping[str, tuple[int, ...]]) -> M:
        """Return the method adjusted to the tensors of a file, where its options are ambiguous.

        Args:
            method: the method from the options.
            shapes: shapes of the tensors by name.
        """
        del shapes
        return method
