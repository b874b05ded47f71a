r"""The choice of a token's experts, and their weights.

    s = softmax(x R + r),    or sigmoid(x R)
    the k experts of largest s_e + b_e,    w_e = scale s_e, or scale s_e / (sum over the chosen s)

The softmax is Mixtral's and Qwen's (Shazeer et al. 2017, section 2.1, arXiv:1701.06538), and with a
bias `r` that of gpt-oss; normalized weights are also the softmax over the logits of the chosen. The
rest is DeepSeek-V3's (DeepSeek-AI 2024, section 2.1.2, arXiv:2412.19437): the bias `b` balances the
load without a loss, and only the choice depends on it; experts may be in groups, of which those
with the largest sum of their two largest `s_e + b_e` take part (section 2.1.2, node-limited
routing).
"""

from __future__ import annotations

from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.core.tree import CORRECTION
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.layers import Linear, dense

Array = jax.Array
_OF_A_GROUP = 2
"""Number of experts that represent a group."""
_TINY = 1e-20


@dataclass(frozen=True)
class Routing:
    """How the experts of a token are chosen.

    Attributes:
        name: name of the module of the router.
        bias: whether it has a bias, which is a part of the scores.
        normalized: whether the weights of a token's experts sum to `scale`.
        sigmoid: whether the scores are sigmoids, computed in float32 from the product on, instead
            of a softmax.
        corrected: whether a bias of each expert, which is not trained, is added for the choice.
        groups: number of groups of experts.
        chosen_groups: number of groups that take part.
        scale: multiplies the weights.
    """

    name: str = "gate"
    bias: bool = False
    normalized: bool = False
    sigmoid: bool = False
    corrected: bool = False
    groups: int = 1
    chosen_groups: int = 1
    scale: float = 1.0

    def problems(self, experts: int, chosen: int) -> list[str]:
        """List why experts cannot be chosen like this.

        Args:
            experts: number of experts.
            chosen: number of experts of a token.
        """
        each = experts // self.groups
        most = self.chosen_groups * each
        found: list[str] = []
        if self.groups > 1 and (experts % self.groups or each < _OF_A_GROUP):
            found.append(
                f"n_group: is {self.groups}, but {experts} experts cannot be divided into so many"
                f" groups of at least {_OF_A_GROUP}"
            )
        elif self.chosen_groups > self.groups:
            found.append(f"topk_group: is {self.chosen_groups}, but n_group is {self.groups}")
        elif chosen > most:
            found.append(
                f"num_experts_per_tok: is {chosen}, but {self.chosen_groups} groups (topk_group)"
                f" have only {most} experts"
            )
        return found


class Router(Linear):
    """A linear module whose outputs are the scores of experts before softmax or sigmoid.

    Attributes:
        corrected: see `Routing`.
    """

    corrected: bool = False

    def setup(self) -> None:
        """Make the bias of the choice, a float32 leaf that no method trains."""
        if self.corrected:
            self.correction = self.param(CORRECTION, nn.initializers.zeros, (self.features,))


def choose(
    routing: Routing, experts: int, chosen: int, x: Array, options: ModelOptions
) -> tuple[Array, Array, Array]:
    """Choose the experts of each token; the router is a module of the calling one.

    Args:
        routing: how they are chosen.
        experts: number of experts.
        chosen: number of experts of a token, k.
        x: `[batch, length, d]`.
        options: options of the model.

    Returns:
        The scores `[batch, length, experts]` and the weights `[batch, length, k]`, float32, and the
        chosen experts `[batch, length, k]`.
    """
    if not routing.sigmoid:
        logits = dense(experts, routing.name, options, bias=routing.bias)(x)
        scores = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen_experts = jax.lax.top_k(scores, chosen)
    else:
        router = Router(
            experts,
            use_bias=routing.bias,
            dtype=jnp.float32,
            precision="highest",
            corrected=routing.corrected,
            name=routing.name,
        )
        scores = jax.nn.sigmoid(router(x.astype(jnp.float32)))
        wanted = scores + router.correction.astype(jnp.float32) if routing.corrected else scores
        _, chosen_experts = jax.lax.top_k(_of_groups(routing, wanted), chosen)
        weights = jnp.take_along_axis(scores, chosen_experts, axis=-1)
    if routing.normalized:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _TINY)
    return scores, weights if routing.scale == 1 else weights * routing.scale, chosen_experts


def _of_groups(routing: Routing, wanted: Array) -> Array:
    """Return `wanted [..., experts]` with the experts of other groups at minus infinity."""
    if routing.chosen_groups == routing.groups:
        return wanted
    grouped = wanted.reshape(*wanted.shape[:-1], routing.groups, -1)
    best = jnp.sum(jax.lax.top_k(grouped, _OF_A_GROUP)[0], axis=-1)
    _, groups = jax.lax.top_k(best, routing.chosen_groups)
    taking_part = jnp.any(jax.nn.one_hot(groups, routing.groups, dtype=bool), axis=-2)
    return jnp.where(taking_part[..., None], grouped, -jnp.inf).reshape(wanted.shape)
