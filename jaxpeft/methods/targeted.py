"""The base class of methods that adapt chosen sites, with Hugging Face PEFT's target options."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, TypeVar

from jaxpeft.core.expressions import find_expression_fault
from jaxpeft.core.method import Method
from jaxpeft.core.options import option, take_aliases
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.targets import (
    ALL_LINEAR,
    Site,
    Targets,
    is_keyword,
    pattern_value,
    require_patterns,
    usual_targets,
)
from jaxpeft.errors import ConfigError, TargetError

TARGET_OPTIONS: Mapping[str, str] = {
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern",
}
"""Maps PEFT's names of the target options to ours."""


M = TypeVar("M", bound="Targeted")


@dataclass(frozen=True)
class TargetedFormat(PeftFormat[M]):
    """The file format of `Targeted` adapters."""

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read `adapter_config.json`, which must name the target modules."""
        values, problems = super().read_options(kind, config)
        if isinstance(values.get("layers_to_transform"), int):
            values["layers_to_transform"] = (values["layers_to_transform"],)
        if values.get("layers_to_transform") in ((), []):
            del values["layers_to_transform"]
        if isinstance(values.get("layers_pattern"), str):
            values["layers_pattern"] = (
                (values["layers_pattern"],) if values["layers_pattern"] else ()
            )
        if not values.get("targets"):
            problems.append("target_modules: is not set; name the modules of the adapter")
        return values, problems

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options, with null for an empty list.

        If PEFT lacks a target option that is set, the file lists the full names of the sites.
        """
        values, known = super().write_options(method), self.names(type(method)).values()
        unsupported = (method.exclude and "exclude" not in known) or (
            method.layers_to_transform is not None and "layers_to_transform" not in known
        )
        by_name = {"target_modules": "default"} if unsupported else {}
        return (
            values
            | {
                key: values[key] or None
                for key in ("exclude_modules", "layers_pattern")
                if key in values
            }
            | by_name
        )


@dataclass(frozen=True, kw_only=True)
class Targeted(Method):
    """A method that adds leaves to chosen sites.

    Class attributes:
        usual_targets: name suffixes of the default sites (`targets="default"`).
    """

    peft: ClassVar[PeftFormat[Any]] = TargetedFormat()

    usual_targets: ClassVar[tuple[str, ...]] = ()

    target_modules: InitVar[str | Sequence[str] | None] = None
    exclude_modules: InitVar[str | Sequence[str] | None] = None
    targets: str | tuple[str, ...] = option(
        ALL_LINEAR,
        "list of name suffixes, a regular expression, 'all-linear', or 'default' for the method's"
        " default sites",
    )
    exclude: str | tuple[str, ...] = option((), "names or regular expression of sites to exclude")
    layers_to_transform: tuple[int, ...] | int | None = option(
        None, "layer numbers to adapt; None for all", at_least=0
    )
    layers_pattern: tuple[str, ...] = option((), "names of the layer containers, such as 'layers'")

    def __post_init__(
        self,
        target_modules: str | Sequence[str] | None,
        exclude_modules: str | Sequence[str] | None,
    ) -> None:
        take_aliases(self, target_modules=target_modules, exclude_modules=exclude_modules)
        super().__post_init__()

    def problems(self) -> list[str]:
        """List incompatible options, as in PEFT."""
        expression = (
            isinstance(self.targets, str)
            and not is_keyword(self.targets)
            and self.targets != "default"
        )
        found: list[str] = []
        if expression and (self.layers_to_transform is not None or self.layers_pattern):
            found.append(
                "layers_to_transform: cannot be used with a regular expression in targets; include"
                " the layers in it"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern: needs layers_to_transform")
        if self.targets == ():
            found.append("targets: is empty; name at least one site, or 'all-linear'")
        if self.targets == "default" and not self.usual_targets:
            found.append(f"targets: {self.name} has no default sites; name them, or 'all-linear'")
        for field, texts in self.expressions(expression).items():
            found += [f"{field}: {why}" for text in texts if (why := find_expression_fault(text))]
        return found

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options that hold regular expressions.

        Args:
            whole: whether `targets` is one.
        """
        return {
            "targets": [self.targets] if whole else [],
            "exclude": [self.exclude],
            "layers_pattern": self.layers_pattern,
        }

    def where(self, names: tuple[str, ...]) -> Targets:
        """Return the target options."""
        layers = self.layers_to_transform
        numbers = (layers,) if isinstance(layers, int) else layers or None
        targets = self.targets
        if targets == "default":
            targets = usual_targets(self.usual_targets, names)
            if not targets:
                raise TargetError(
                    f"targets: the model has none of the default sites of {self.name}"
                    f" ({', '.join(self.usual_targets)}); name its sites"
                )
        return Targets(targets, self.exclude, numbers, self.layers_pattern, self.modules_to_save)


def require_divisor(field: str, size: int, site: Site) -> None:
    """Raise an error if a block size does not divide the inputs and outputs of a site.

    Raises:
        ConfigError: It does not; the message names the site and the largest valid size.
    """
    n_in, n_out = site.shape
    if n_in % size or n_out % size:
        raise ConfigError(
            f"{field}: {size} does not divide the {n_in} inputs and {n_out} outputs of {site.name};"
            f" use a divisor of both, such as {math.gcd(n_in, n_out)}, or exclude the site"
        )


@dataclass(frozen=True, kw_only=True)
class Ranked(Targeted):
    """A targeted method with a rank and a scaling `s`, `alpha / rank` or, with rsLoRA,
    `alpha / sqrt(rank)`.
    """

    rank: int = option(8, "rank r of the update", at_least=1)
    alpha: float = option(16.0, "numerator of the scaling", above=0)
    rank_pattern: dict[str, int] = option({}, "other ranks, by suffix of a site's name", at_least=1)
    alpha_pattern: dict[str, float] = option(
        {}, "other alphas, by suffix of a site's name", above=0
    )

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        return super().expressions(whole) | {
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if a rank or alpha pattern matches no adapted site.

        Raises:
            TargetError: A pattern is invalid; it names it.
        """
        require_patterns("rank_pattern", self.rank_pattern, names)
        require_patterns("alpha_pattern", self.alpha_pattern, names)

    def site_rank(self, name: str) -> int:
        """Return the rank at the site with this Hugging Face name."""
        return pattern_value(name, self.rank_pattern, self.rank)

    def site_scale(self, name: str) -> float:
        """Return the scaling s at the site with this Hugging Face name."""
        return pattern_value(name, self.alpha_pattern, self.alpha) / self.site_rank(name)
