"""Several methods at once, on different sites: one method made of methods.

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
    from jaxpeft import methods  # the table that this method stands in

    return methods.read(values, where)


@dataclass(frozen=True)
class MixedFormat(PeftFormat["Mixed"]):
    """How adapters of `Mixed` stand in files."""

    def wrapper(self, method: Mixed, path: Path, by: Method | None) -> str:
        """Return what the part does; PEFT keeps a part beside another in a module of its own."""
        inner = by.peft.wrapper(by, path, by) if by else ""
        held = next((part.peft.beside for part in method.methods if part.peft.beside), None)
        return f"{held.module}.{inner}" if held and by and by.name == held.method else inner


@dataclass(frozen=True, kw_only=True)
class Mixed(Method):
    """A method made of methods, in the order in which they are applied.

    Two of them may not put the same leaves at one site; where they are of the same kind, their
    targets must not overlap.
    """

    name: ClassVar[str] = "mixed"
    paper: ClassVar[str] = "arXiv:2110.07577"
    peft: ClassVar[PeftFormat[Any]] = MixedFormat()

    methods: tuple[core.Method, ...] = option(
        (), "the methods, each a section with its `name` and options", read=_read
    )

    def problems(self) -> list[str]:
        """List what cannot be put together."""
        found = (
            ["methods: names fewer than two; use the method itself"]
            if len(self.methods) < 2
            else []
        )
        found += [
            "methods: holds a mixed method; write its methods out"
            for m in self.methods
            if isinstance(m, Mixed)
        ]
        whole = [m.name for m in self.methods if m.leaves.root]
        if len(set(whole)) < len(whole) or len(whole) > 1:
            found.append(
                f"methods: {' and '.join(whole)} each keep leaves for the whole model; take one of"
                " them"
            )
        for i, part in enumerate(self.methods):
            for other in self.methods[:i]:
                if (
                    part.leaves.site
                    and part.leaves.site == other.leaves.site
                    and part.leaves.trained != other.leaves.trained
                ):
                    found.append(
                        f"methods: {other.name} and {part.name} train other ones of the same"
                        " leaves; take one of them"
                    )
                if type(part) is type(other) and isinstance(part, training_hooks.Optimizing):
                    found.append(
                        f"methods: two {part.name} would each wrap the optimizer; put the sites of"
                        " both into one"
                    )
            if getattr(part, "init_weights", "") == "eva":
                found.append(
                    "methods: init_weights 'eva' gives ranks to the sites of one method alone; take"
                    " another start"
                )
        return found

    def parts(self) -> tuple[Method, ...]:
        """Return the methods, the first with the modules that the whole saves."""
        return self.methods

    def trains(self, path: Path, params: Leaves) -> bool:
        """Train what any of the methods trains."""
        return any(part.trains(path, params) for part in self.methods)

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Start each method; each sees the model with those before it."""
        made: list[Method] = []
        for part in self.methods:
            begun, params = training_hooks.start(part, params, run)
            made.append(begun)
        return Mixed(methods=tuple(made), modules_to_save=self.modules_to_save), params

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values."""
        return {
            "name": self.name,
            "modules_to_save": self.modules_to_save,
            "methods": tuple(part.as_dict() for part in self.methods),
        }
