"""Mixed methods: several methods at once, on different sites.

    LoRA on attention, adapters on feed-forward, BitFit on norms

Each computes its own sites; what is trained is what any of them trains. Mao et al. 2021, "UniPELT:
A Unified Framework for Parameter-Efficient Language Model Tuning", section 3, without its gates
(arXiv:2110.07577).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jaxpeft.core.method as core
from jaxpeft.core import training_hooks
from jaxpeft.core.method import Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat


def _read(values: Mapping[str, Any], where: str) -> tuple[Method | None, list[str]]:
    from jaxpeft import methods  # imported here because it imports this module

    return methods.read(values, where)


@dataclass(frozen=True)
class MixedFormat(PeftFormat["Mixed"]):
    """The file format of `Mixed` adapters."""

    def wrapper(self, method: Mixed, path: Path, by: Method | None) -> str:
        """Return the part's infix, within PEFT's module for an additional method."""
        inner = by.peft.wrapper(by, path, by) if by else ""
        held = next((part.peft.companion for part in method.methods if part.peft.companion), None)
        return f"{held.module}.{inner}" if held and by and by.name == held.method else inner


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """A combination of methods, in the order in which they are applied.

    Two of them cannot add the same leaves to one site, so methods of the same kind must not have
    overlapping targets.
    """

    name: ClassVar[str] = "mixed"
    paper: ClassVar[str] = "arXiv:2110.07577"
    peft: ClassVar[PeftFormat[Any]] = MixedFormat()

    methods: tuple[core.Method, ...] = option(
        (), "the methods, each a section with its `name` and options", read=_read
    )

    def problems(self) -> list[str]:
        """List incompatible methods."""
        found = (
            ["methods: must name at least two methods; use the method itself"]
            if len(self.methods) < 2
            else []
        )
        found += [
            "methods: contains a mixed method; list its methods instead"
            for m in self.methods
            if isinstance(m, Mixed)
        ]
        rooted = [m.name for m in self.methods if m.leaves.root]
        if len(set(rooted)) < len(rooted) or len(rooted) > 1:
            found.append(
                f"methods: {' and '.join(rooted)} each have leaves for the entire model; use only"
                " one of them"
            )
        for i, part in enumerate(self.methods):
            for other in self.methods[:i]:
                if (
                    part.leaves.site
                    and part.leaves.site == other.leaves.site
                    and part.leaves.trained != other.leaves.trained
                ):
                    found.append(
                        f"methods: {other.name} and {part.name} share leaves but train different"
                        " ones; use only one of them"
                    )
                if type(part) is type(other) and isinstance(part, training_hooks.OptimizerHook):
                    found.append(
                        f"methods: two {part.name} would each wrap the optimizer; combine their"
                        " sites in one"
                    )
            if getattr(part, "init_weights", "") == "eva":
                found.append(
                    "methods: init_weights 'eva' does not support several methods; choose another"
                    " initialization"
                )
        return found

    def parts(self) -> tuple[Method, ...]:
        """Return the methods."""
        return self.methods

    def trains(self, path: Path, params: Leaves) -> bool:
        """Return whether any of the methods trains a leaf."""
        return any(part.trains(path, params) for part in self.methods)

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Initialize each method from the tree as initialized by the ones before it."""
        methods: list[Method] = []
        for part in self.methods:
            started, params = training_hooks.start(part, params, run)
            methods.append(started)
        return Mixed(methods=tuple(methods), modules_to_save=self.modules_to_save), params

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {
            "name": self.name,
            "modules_to_save": self.modules_to_save,
            "methods": tuple(part.as_dict() for part in self.methods),
        }
