"""The section of a config that makes it a comparison: methods that are trained on the same rows,
for the same steps.
"""

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
    """One method of a comparison; what it does not set is that of the config."""

    name: str = option("", "name of its row and of its folder; empty for the method's")
    method: Method = option(
        LoRA,
        "the fine-tuning method: `name` and its hyperparameters; left out, that of the config",
        read=read,
    )
    learning_rate: float | None = option(
        None, "peak learning rate; None for optimizer.learning_rate", above=0
    )
    head_learning_rate: float | None = option(
        None, "that of the head; None for the optimizer's", above=0
    )

    @property
    def title(self) -> str:
        """What it is called."""
        return self.name or self.method.name

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        found: list[str] = []
        if why := names.problem(self.title):
            found.append(f"name: {why}")
        if self.name in METHODS and self.name != self.method.name:
            found.append(
                f"name: {self.name!r} is a method, and this candidate's is {self.method.name!r};"
                " set its method.name"
            )
        if trains_head_alone(self.method) and self.learning_rate is not None:
            found.append(
                f"learning_rate: {self.method.name!r} trains the head alone; set head_learning_rate"
            )
        return found


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What `python -m jaxpeft.compare` compares."""

    candidates: tuple[CandidateConfig, ...] = option(
        (), "the methods, each with its learning rates"
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2), "train.seed of the runs of each candidate", at_least=0, below=2**32
    )
    reference: str | None = option(
        None,
        "candidate that the others' figures are given as a share of; None for the one whose method"
        " is full",
    )
    forgetting: str = option(
        "",
        "rows of something else, by which to tell what the base has forgotten; labeled, or texts of"
        " a language model",
    )

    @property
    def titles(self) -> tuple[str, ...]:
        """What the candidates are called."""
        return tuple(candidate.title for candidate in self.candidates)

    @property
    def compared_with(self) -> str | None:
        """The name of the candidate that the others are given as a share of, None where there is
        none.
        """
        full = (candidate.title for candidate in self.candidates if candidate.method.name == "full")
        return self.reference or next(full, None)

    def problems(self) -> list[str]:
        """List what is wrong across options."""
        found = [
            f"candidates: {count} of them are called {title!r}; give each a name of its own"
            for title, count in Counter(self.titles).items()
            if count > 1
        ]
        if not self.candidates:
            return found
        if not self.seeds:
            found.append("seeds: is empty; give at least one")
        found += [
            f"seeds: {seed} stands there {n} times; give it once"
            for seed, n in Counter(self.seeds).items()
            if n > 1
        ]
        if self.reference is not None and self.reference not in self.titles:
            found.append(
                f"reference: {show(self.reference)} is not a"
                f" candidate{nearest(self.reference, self.titles)} (there are:"
                f" {', '.join(self.titles)})"
            )
        return found
