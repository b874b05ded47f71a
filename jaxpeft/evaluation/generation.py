"""Generating text by taking the likeliest token, one after the other."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping, Sequence, Set
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxpeft.forward import apply
from jaxpeft.models.base import Pretrained
from jaxpeft.sharding.logical_axes import mesh_under


def greedy(
    model: nn.Module,
    params: Mapping[str, Any],
    prompts: Sequence[Sequence[int]],
    *,
    most: int,
    ends: Set[int],
) -> list[list[int]]:
    """Continue prompts by the likeliest token each.

    The whole row is computed anew for every token, with one program for all of them: for a few
    samples, not for many.

    Args:
        model: a decoder with a language-model head.
        params: its parameters, adapters included.
        prompts: token ids of each prompt, at least one each.
        most: how many tokens to add at most.
        ends: the tokens that end an answer.

    Returns:
        The added tokens of each prompt, up to the first of `ends`.
    """
    sizes = np.array([len(prompt) for prompt in prompts])
    length = int(sizes.max()) + most
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt

    # the same on every device, and so in every process
    mesh = mesh_under(params)
    whole = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if isinstance(
        model, Pretrained
    ):  # a kernel that the partitioner cannot split has no say here: the rows are few
        model = model.clone(options=dataclasses.replace(model.options, attention="xla"))

    @functools.partial(jax.jit, out_shardings=whole)
    def step(params: Mapping[str, Any], rows: jax.Array, at: jax.Array) -> jax.Array:
        # what stands behind a place is not seen from it, so padding needs no mask
        logits = apply(model, params, rows, jnp.ones_like(rows))
        last = jnp.take_along_axis(logits, (at - 1)[:, None, None], axis=1)[:, 0]
        return rows.at[jnp.arange(len(rows)), at].set(last.argmax(-1).astype(rows.dtype))

    made = jnp.asarray(rows) if whole is None else jax.device_put(rows, whole)
    for i in range(most):
        made = step(params, made, sizes + i)
        if all(ends & set(_place_tokens(made, sizes, row, i + 1)) for row in range(len(prompts))):
            break
    out = [_place_tokens(made, sizes, row, most) for row in range(len(prompts))]
    return [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in out]


def _place_tokens(rows: jax.Array, sizes: np.ndarray[Any, Any], row: int, count: int) -> list[int]:
    return np.asarray(rows)[row, int(sizes[row]) : int(sizes[row]) + count].tolist()
