r"""Multi-head latent attention: keys and values from a narrow vector of each token, the latent.

    c = norm(x A_kv),    [k_h; v_h] = c B_h,    r = rotate(x A_r),    [q_h; s_h] = norm(x A_q) B'_h
    logits of head h = scale (q_h k_h' + rotate(s_h) r')

`A_kv` and `A_r` are one module, `kv_a_proj_with_mqa`, and the `B_h` of all heads another,
`kv_b_proj`. The rotated key `r` is shared by all heads. Values may have another size than keys.

DeepSeek-AI 2024, "DeepSeek-V2", section 2.1 (arXiv:2405.04434), and "DeepSeek-V3", section 2.1.1
(arXiv:2412.19437).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxpeft.models.base import ModelOptions
from jaxpeft.models.layers import RMSNorm, dense, mark_product

Array = jax.Array
_EPS = 1e-6
"""Of the norms of latents, whatever `rms_norm_eps` says."""


@dataclass(frozen=True)
class Latent:
    """The sizes of latent attention.

    Attributes:
        heads: number of heads.
        query_rank: width of the latent of queries; None if they have none.
        rank: width of the latent of keys and values.
        plain: number of dimensions of a query or key head that are not rotated, the first ones.
        rotated: number of its rotated dimensions.
        value: size of a value head.
        bias: whether the projections to latents have biases.
    """

    heads: int
    query_rank: int | None
    rank: int
    plain: int
    rotated: int
    value: int
    bias: bool

    @property
    def size(self) -> int:
        """The size of a query or key head."""
        return self.plain + self.rotated


class Turn(Protocol):
    """The rotation of a layer's queries and keys."""

    def queries(self, q: Array) -> Array:
        """Return the rotated queries."""
        ...

    def keys(self, k: Array) -> Array:
        """Return the rotated keys."""
        ...


def latent_heads(
    latent: Latent,
    options: ModelOptions,
    x: Array,
    rotation: Turn,
) -> tuple[Array, Array, Array]:
    """Return queries, keys and values, with their modules in the scope of the calling module.

    Args:
        latent: the sizes.
        options: options of the model.
        x: `[batch, length, d]`.
        rotation: rotates the queries `[batch, length, heads, rotated]` and the shared key
            `[batch, length, 1, rotated]`.

    Returns:
        Queries and keys `[batch, length, heads, plain + rotated]`, and values
        `[batch, length, heads, value]`.
    """
    n, bias, wide = latent.heads, latent.bias, latent.heads * latent.size
    narrow = dense(latent.rank + latent.rotated, "kv_a_proj_with_mqa", options, bias=bias)
    if latent.query_rank is None:
        q, joint = dense(wide, "q_proj", options, bias=False).together(x, narrow)
    else:
        first = dense(latent.query_rank, "q_a_proj", options, bias=bias)
        q, joint = (mark_product(y) for y in first.together(x, narrow))
        q = RMSNorm(_EPS, options.dtype, name="q_a_layernorm")(q)
        q = dense(wide, "q_b_proj", options, bias=False)(q)
    compressed, shared = jnp.split(mark_product(joint), (latent.rank,), axis=-1)
    compressed = RMSNorm(_EPS, options.dtype, name="kv_a_layernorm")(compressed)
    expand = dense(n * (latent.plain + latent.value), "kv_b_proj", options, bias=False)
    q, both = (y.reshape(*y.shape[:2], n, -1) for y in (q, expand(compressed)))
    q, turned = jnp.split(q, (latent.plain,), axis=-1)
    k, v = jnp.split(both, (latent.plain,), axis=-1)
    turned, shared = rotation.queries(turned), rotation.keys(shared[:, :, None])
    shared = jnp.broadcast_to(shared, (*k.shape[:3], latent.rotated))
    return jnp.concatenate([q, turned], axis=-1), jnp.concatenate([k, shared], axis=-1), v
