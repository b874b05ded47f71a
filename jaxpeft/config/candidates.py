"""Config section of a comparison: methods to train on the same rows for the same steps."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from jaxpeft import names
from jaxpeft.core.method import Method
from jaxpeft.core.options import option
from jaxpeft.core.training_hooks import trains_head_alone
from jaxpeft.errors import nearest, show
from jaxpeft.methods import METHODS, read
from jaxpeft.methods.lora import LoRA


@dataclass(frozen=True, kw_only=True)
class CandidateConfig:
    """One method of a comparison; unset options are taken from the config."""

    name: str = option("", "name of its row and folder; empty for the method's name")
    method: Method = option(
        LoRA,
        "fine-tuning method: `name` and its hyperparameters; the config's by default",
        read=read,
    )
    learning_rate: float | None = option(
        None, "peak learning rate; None for optimizer.learning_rate", above=0
    )
    head_learning_rate: float | None = option(
        None, "peak learning rate of the head; None for optimizer.head_learning_rate", above=0
    )

    @property
    def title(self) -> str:
        """Name of the candidate, by default its method's."""
        return self.name or self.method.name

    def problems(self) -> list[str]:
        """List problems across options."""
        found: list[str] = []
        if why := names.problem(self.title):
            found.append(f"name: {why}")
        if self.name in METHODS and self.name != self.method.name:
            found.append(
                f"name: {self.name!r} is the name of a method, but this candidate's method is"
                f" {self.method.name!r}; set method.name, or use another name"
            )
        if trains_head_alone(self.method) and self.learning_rate is not None:
            found.append(
                f"learning_rate: {self.method.name!r} trains only the head; set head_learning_rate"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Methods that `python -m jaxpeft.compare` compares."""

    candidates: tuple[CandidateConfig, ...] = option(
        (), "methods to compare, each with its learning rates"
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "values of train.seed, one run each per candidate", at_least=0, below=2**32
    )
    reference: str | None = option(
        None,
        "candidate relative to which the others' metrics are reported; None for the one with method"
        " full",
    )
    forgetting: str = option(
        "",
        "rows of another task, on which forgetting is measured: labeled rows, or texts for a"
        " language model",
    )

    @property
    def titles(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(candidate.title for candidate in self.candidates)

    @property
    def compared_with(self) -> str | None:
        """Name of the reference candidate, or None."""
        full = (candidate.title for candidate in self.candidates if candidate.method.name == "full")
        return self.reference or next(full, None)

    def problems(self) -> list[str]:
        """List problems across options."""
        found = [
            f"candidates: {count} are named {title!r}; give each a different name"
            for title, count in Counter(self.titles).items()
            if count > 1
        ]
        if not self.candidates:
            return found
        if not self.seeds:
            found.append("seeds: is empty; give at least one")
        found += [
            f"seeds: lists {seed} {n} times; list it once"
            for seed, n in Counter(self.seeds).items()
            if n > 1
        ]
        if self.reference is not None and self.reference not in self.titles:
            found.append(
                f"reference: {show(self.reference)} is not a"
                f" candidate{nearest(self.reference, self.titles)} (known:"
                f" {', '.join(self.titles)})"
            )
        return found
