"""The low-rank updates of an adapter, `W + s A B`: what the files of servers can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxpeft.core import paths
from jaxpeft.core.method import Method
from jaxpeft.core.paths import Tree
from jaxpeft.core.specs import SiteSpec
from jaxpeft.hub.adapters import tensors as adapter_tensors
from jaxpeft.methods.dora import DoRA
from jaxpeft.methods.lora import LoRA
from jaxpeft.transforms.rewrite import rewrite

Array = np.ndarray[Any, Any]
_SHOWN = 5
PREFIX = "base_model.model."
"""In front of a module's name in PEFT's files."""


@dataclass(frozen=True)
class Update:
    """The update of one module; arrays are float32.

    Attributes:
        module: its Hugging Face name.
        a: `[in, r]`, or `[vocab, r]` of an embedding.
        b: `[r, out]`.
        scale: s.
        magnitude: `[out]`, the norms of the columns of the result, as in DoRA; None for a plain
            update.
        embedding: whether the module is an embedding.
    """

    module: str
    a: Array
    b: Array
    scale: float
    magnitude: Array | None = None
    embedding: bool = False

    @property
    def rank(self) -> int:
        """The number of columns of A."""
        return self.a.shape[1]


def is_low_rank(kind: type[Method]) -> bool:
    """Return whether a method's sites have low-rank updates."""
    return kind.sites.update is not SiteSpec().update


def updates_of(method: Method, params: Mapping[str, Any]) -> tuple[list[Update], list[str]]:
    """Return the updates of an adapter, and what else it changes.

    Args:
        method: the method that rewrote `params`.
        params: the rewritten tree.

    Returns:
        `(updates, problems)`; a problem names a part of the adapter that is no low-rank update.
    """
    whole = [
        f"{one.name.removeprefix(method.peft.module_prefix)} is trained in full"
        for one in adapter_tensors.whole_tensors(method, params)
    ]
    problems = [*whole[:_SHOWN], *([f"and {len(whole) - _SHOWN} more"] if whole[_SHOWN:] else [])]
    found: dict[str, Update] = {}
    others: dict[str, str] = {}
    for entry in adapter_tensors.find_adapted(method, params):
        part, site = entry.method, entry.site
        if not site.path:
            if not is_low_rank(type(part)):
                others[part.name] = f"{part.name} adds virtual tokens or other leaves to the model"
            continue
        leaves = {**params, **paths.get(params, site.path)}
        update = part.sites.update(site.shape, leaves)
        if update is None or site.name in found:
            others[part.name] = f"{part.name} changes {site.name} by more than one product A B"
            continue
        found[site.name] = Update(
            site.name,
            np.asarray(update.a, np.float32),
            np.asarray(update.b, np.float32),
            float(update.scale),
            None if update.magnitude is None else np.asarray(update.magnitude, np.float32),
            site.kind == "embedding",
        )
    return list(found.values()), problems + list(others.values())


def uniform(updates: Sequence[Update]) -> list[Update]:
    """Return the same updates with one rank and one scale, for files that have one for all.

    Smaller A and B are padded with zeros. Scales that differ are multiplied into B.
    """
    rank = max(one.rank for one in updates)
    scales = {one.scale for one in updates}
    scale = scales.pop() if len(scales) == 1 else 1.0

    def same(one: Update) -> Update:
        more = rank - one.rank
        b = one.b if one.scale == scale else one.b * np.float32(one.scale / scale)
        return dataclasses.replace(
            one,
            a=np.pad(one.a, ((0, 0), (0, more))),
            b=np.pad(b, ((0, more), (0, 0))),
            scale=scale,
        )

    return [same(one) for one in updates]


def with_updates(updates: Sequence[Update], base: Mapping[str, Any]) -> tuple[Method, Tree]:
    """Return a plain LoRA with these updates, or DoRA, and the base with its leaves.

    Args:
        updates: updates with one rank and one scale, all with a magnitude or none.
        base: parameters of the base.
    """
    first = updates[0]
    kind = LoRA if first.magnitude is None else DoRA
    method = kind(
        rank=first.rank,
        alpha=first.scale * first.rank,
        targets=tuple(sorted(one.module for one in updates)),
    )
    tensors: dict[str, Array] = {}
    for one in updates:
        a, b = (
            ("lora_embedding_A", "lora_embedding_B")
            if one.embedding
            else ("lora_A.weight", "lora_B.weight")
        )
        prefix = f"{PREFIX}{one.module}."
        tensors |= {prefix + a: one.a.T, prefix + b: one.b.T}
        if one.magnitude is not None:
            tensors[f"{prefix}lora_magnitude_vector"] = one.magnitude
    fresh = rewrite(method, base, jax.random.key(0))
    return method, adapter_tensors.put_tensors(method, fresh, tensors)
