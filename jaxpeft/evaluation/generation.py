"""Greedy text generation."""

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
    """Continue prompts with greedy decoding.

    There is no KV cache: every token recomputes the full row, with a single compiled program. Use
    it for a few samples only.

    Args:
        model: a decoder with a language-model head.
        params: its parameters, including adapters.
        prompts: token ids of each prompt, at least one.
        most: maximum number of new tokens.
        ends: token ids that end an answer.

    Returns:
        The new tokens of each prompt, up to the first of `ends`.
    """
    sizes = np.array([len(prompt) for prompt in prompts])
    length = int(sizes.max()) + most
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt

    # replicate the rows on all devices, and so in all processes
    mesh = mesh_under(params)
    replicated = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    if isinstance(model, Pretrained):
        # the partitioner cannot shard custom attention kernels, and there are only a few rows
        model = model.clone(options=dataclasses.replace(model.options, attention="xla"))

    @functools.partial(jax.jit, out_shardings=replicated)
    def step(params: Mapping[str, Any], rows: jax.Array, at: jax.Array) -> jax.Array:
        # attention is causal, so padding on the right needs no mask
        logits = apply(model, params, rows, jnp.ones_like(rows))
        last = jnp.take_along_axis(logits, (at - 1)[:, None, None], axis=1)[:, 0]
        return rows.at[jnp.arange(len(rows)), at].set(last.argmax(-1).astype(rows.dtype))

    tokens = jnp.asarray(rows) if replicated is None else jax.device_put(rows, replicated)
    for i in range(most):
        tokens = step(params, tokens, sizes + i)
        if all(ends & set(_new_tokens(tokens, sizes, row, i + 1)) for row in range(len(prompts))):
            break
    out = [_new_tokens(tokens, sizes, row, most) for row in range(len(prompts))]
    return [list(itertools.takewhile(lambda token: token not in ends, ids)) for ids in out]


def _new_tokens(rows: jax.Array, sizes: np.ndarray[Any, Any], row: int, count: int) -> list[int]:
    return np.asarray(rows)[row, int(sizes[row]) : int(sizes[row]) + count].tolist()
