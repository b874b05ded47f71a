r"""A mixture of experts in place of a layer's feed-forward.

    y = f_shared(x) + sum over the k chosen experts e of w_e f_e(x)
    f(x) = down(act(gate(x)) * up(x))

Each token computes with its k experts (Shazeer et al. 2017, section 2.1, arXiv:1701.06538; Jiang et
al. 2024, "Mixtral of Experts", section 2.1, arXiv:2401.04088), which `jaxpeft.models.router`
chooses with their weights `w_e`, and with those that all tokens share, if there are some (Dai et
al. 2024, "DeepSeekMoE", section 3.2, arXiv:2401.06066). Copies of the tokens are sorted by expert,
so that each expert computes consecutive rows (`jaxpeft.kernels.grouped`); no token is dropped. On a
mesh, each shard of the rows is sorted alone.

The load-balancing loss is `E sum over e of f_e P_e`, with the mean number of times `f_e` that a
token chooses expert e, and the mean `P_e` of its score, over the tokens of all layers (Fedus et al.
2022, "Switch Transformers", section 2.2, arXiv:2101.03961).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxpeft.core import paths
from jaxpeft.core.expert_sites import Over
from jaxpeft.kernels import grouped
from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import ROUTING, ModelOptions
from jaxpeft.models.layers import dense, mark_product
from jaxpeft.models.router import Routing, choose
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, MLP, constrain, size_of
from jaxpeft.sharding.sizes import ROWS, SEQUENCE

Array = jax.Array
_CHOICES, _PROBABILITIES, _TOKENS = "choices", "probabilities", "tokens"


@dataclass(frozen=True)
class Clamp:
    """A gated activation of bounded parts: `(u + 1) g sigmoid(a g)`.

    `g` is the gate, at most `m`, and `u` the other part, between `-m` and `m`: Agarwal et al. 2025,
    "gpt-oss-120b & gpt-oss-20b Model Card", section 2.1 (arXiv:2508.10925).

    Attributes:
        slope: a.
        limit: m.
    """

    slope: float
    limit: float

    def gated(self, gate: Array, up: Array) -> Array:
        """Return the product of both parts, of one shape."""
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return (up + 1) * gate * jax.nn.sigmoid(self.slope * gate)


@dataclass(frozen=True)
class Mixture:
    """The experts of a layer.

    Attributes:
        module: name of the module in a layer.
        names: names of the modules gate, up and down of an expert, or of a joint module for gate
            and up, and down.
        experts: number of experts.
        chosen: number of experts of a token.
        width: width of an expert.
        routing: how the experts of a token are chosen.
        balance: weight of the load-balancing loss; 0 for none.
        shared: width of the experts that all tokens share, together; 0 for none.
        bias: whether the experts have biases.
        stacked: whether checkpoints hold the tensors of all experts of a layer as one.
        clamp: how gate and up are bounded and multiplied, in place of the activation; None for the
            activation.

    The outputs of a joint module alternate: the even ones are of gate, the odd ones of up.
    """

    module: str
    names: tuple[str, ...]
    experts: int
    chosen: int
    width: int
    routing: Routing
    balance: float
    shared: int = 0
    bias: bool = False
    stacked: bool = False
    clamp: Clamp | None = None

    @property
    def joint(self) -> bool:
        """Whether one module computes gate and up."""
        return len(self.names) == 2


class ExpertDense(nn.Module):
    """A linear module with one kernel `[in, out]`, and maybe one bias, for each expert.

    Attributes:
        experts: number of experts.
        features: number of outputs.
        dtype: dtype of the products.
        bias: whether it has biases.
    """

    experts: int
    features: int
    dtype: Any
    bias: bool = False

    @nn.compact
    def grouped(self, x: Array, sizes: Array, over: Over) -> Array:
        """Return `x_i W_e + b_e` for each row.

        Args:
            x: `[shards, rows, in]`, each shard sorted by expert.
            sizes: `[shards, experts]` int32, the number of rows of each expert.
            over: computes the products of all shards.
        """
        init = nn.initializers.lecun_normal(batch_axis=(0,))
        shape = (self.experts, x.shape[-1], self.features)
        kernel = self.param("kernel", init, shape, jnp.float32)
        leaves = {"kernel": kernel}
        if self.bias:
            shape = (self.experts, self.features)
            leaves["bias"] = self.param("bias", nn.initializers.zeros, shape, jnp.float32)

        def products(x: Array, sizes: Array, leaves: Mapping[str, Array]) -> Array:
            y = grouped.product(x, leaves["kernel"], sizes)
            return grouped.add(y, leaves["bias"], sizes) if "bias" in leaves else y

        return over(products)(x.astype(self.dtype), sizes, leaves)


class _Experts(nn.Module):
    """The feed-forward of all experts."""

    mixture: Mixture
    activation: str
    options: ModelOptions

    @nn.compact
    def __call__(self, x: Array, sizes: Array, over: Over) -> Array:
        m = self.mixture
        widths = (2 * m.width,) if m.joint else (m.width, m.width)
        *inner, down = (
            ExpertDense(m.experts, width, self.options.dtype, m.bias, name=name)
            for width, name in zip((*widths, x.shape[-1]), m.names, strict=True)
        )
        parts = [mark_product(part.grouped(x, sizes, over)) for part in inner]
        if m.joint:
            pairs = parts[0].reshape(*parts[0].shape[:-1], m.width, 2)
            parts = [pairs[..., 0], pairs[..., 1]]
        gate, up = parts
        h = m.clamp.gated(gate, up) if m.clamp else ACTIVATIONS[self.activation](gate) * up
        return down.grouped(h, sizes, over)


class _SharedExperts(nn.Module):
    """The feed-forward of the experts that all tokens share."""

    mixture: Mixture
    activation: str
    options: ModelOptions

    @nn.compact
    def __call__(self, x: Array) -> Array:
        m = self.mixture
        gate, up, down = (
            dense(width, name, self.options, bias=False)
            for width, name in zip((m.shared, m.shared, x.shape[-1]), m.names, strict=True)
        )
        h, gain = (mark_product(constrain(y, BATCH, LENGTH, MLP)) for y in gate.together(x, up))
        return down(ACTIVATIONS[self.activation](h) * gain)


class SparseFeedForward(nn.Module):
    """The router and the experts of a layer."""

    mixture: Mixture
    activation: str
    options: ModelOptions

    @nn.compact
    def __call__(
        self, x: Array, residual: Array, finish: Callable[[Array], Array], real: Array | None
    ) -> Array:
        """Map `x [batch, length, d]`, and add it to the residual stream.

        Args:
            x: the normalized residual stream.
            residual: `x` before the norm.
            finish: what is applied to the result before the sum.
            real: bool `[batch, length]`, the tokens that count in the load-balancing loss; None for
                all.
        """
        m = self.mixture
        scores, weights, chosen = choose(m.routing, m.experts, m.chosen, x, self.options)
        _sow_routing(self, scores, chosen, real)
        run = _Experts(m, self.activation, self.options, name="experts")
        shards = _shards(*x.shape[:2])
        rows = shards.split(x)
        copies = shards.split(chosen).reshape(len(rows), -1)
        order = jnp.argsort(copies, axis=-1, stable=True)
        inverse = jnp.argsort(order, axis=-1)
        sizes = jnp.sum(jax.nn.one_hot(copies, m.experts, dtype=jnp.int32), axis=1)
        spread = _permute(jnp.repeat(rows, m.chosen, axis=1), order, inverse)
        out = _permute(run(spread, sizes, shards.over), inverse, order)
        out = shards.join(out.reshape(*rows.shape[:2], m.chosen, -1)).astype(jnp.float32)
        out = jnp.sum(out * weights[..., None], axis=-2).astype(x.dtype)
        if m.shared:
            out += _SharedExperts(m, self.activation, self.options, name="shared_experts")(x)
        return constrain(residual + finish(out), BATCH, LENGTH, HIDDEN)


@dataclass(frozen=True)
class _Shards:
    """How the tokens of a batch are spread over devices.

    Attributes:
        batch: number of rows.
        length: number of positions.
        rows: number of shards of the rows.
        parts: number of shards of the positions.
    """

    batch: int
    length: int
    rows: int
    parts: int

    def split(self, x: Array) -> Array:
        """Return the tokens `[shards, tokens, ...]` of each shard, from `[batch, length, ...]`."""
        rest = x.shape[2:]
        split = (self.rows, self.batch // self.rows, self.parts, self.length // self.parts)
        return jnp.swapaxes(x.reshape(*split, *rest), 1, 2).reshape(
            self.rows * self.parts, -1, *rest
        )

    def join(self, y: Array) -> Array:
        """Return `[batch, length, ...]`, the inverse of `split`."""
        rest = y.shape[2:]
        split = (self.rows, self.parts, self.batch // self.rows, self.length // self.parts)
        return jnp.swapaxes(y.reshape(*split, *rest), 1, 2).reshape(self.batch, self.length, *rest)

    def over(self, fn: Callable[..., Array]) -> Callable[..., Array]:
        """Lift a function of the rows and sizes of one shard, and of leaves, to all shards.

        Each device computes its own shard; along `tensor` the partitioner shards the products.
        """
        axes = ROWS * (self.rows > 1) + (SEQUENCE,) * (self.parts > 1)

        def one(x: Array, sizes: Array, *leaves: Any) -> Array:
            return fn(x[0], sizes[0], *leaves)[None]

        if not axes:
            return one
        each = PartitionSpec(axes)

        def every(x: Array, sizes: Array, *leaves: Any) -> Array:
            whole = jax.tree.map(lambda _: PartitionSpec(), leaves)
            run = jax.shard_map(
                one,
                in_specs=(each, each, *whole),
                out_specs=each,
                axis_names=set(axes),
                check_vma=False,
            )
            return run(x, sizes, *leaves)

        return every


def _shards(batch: int, length: int) -> _Shards:
    """Return how the tokens of a batch are spread over the mesh of the current trace."""
    rows, parts = size_of(*ROWS), size_of(SEQUENCE)
    return _Shards(
        batch, length, rows if batch % rows == 0 else 1, parts if length % parts == 0 else 1
    )


@jax.custom_vjp
def _permute(x: Array, order: Array, inverse: Array) -> Array:
    """Return the rows of `x [shards, rows, d]` in another order.

    The gradient is a gather too, in the inverse order: a scatter would add in no fixed order.
    """
    del inverse
    return jnp.take_along_axis(x, order[..., None], axis=1)


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return _permute(x, order, inverse), (order, inverse)


def _permute_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array, None, None]:
    order, inverse = saved
    return _permute(dy, inverse, order), None, None


_permute.defvjp(_permute_forward, _permute_backward)


def _sow_routing(module: nn.Module, p: Array, chosen: Array, real: Array | None) -> None:
    """Sow the sums of a layer for the load-balancing loss, if `ROUTING` is mutable.

    Args:
        module: the module of the layer.
        p: `[batch, length, experts]`, the scores.
        chosen: `[batch, length, k]`, the chosen experts.
        real: see `SparseFeedForward`.
    """
    if not module.is_mutable_collection(ROUTING) or module.is_initializing():
        return
    counted = jnp.ones(p.shape[:2]) if real is None else real.astype(jnp.float32)
    counts = jnp.sum(jax.nn.one_hot(chosen, p.shape[-1]), axis=2)
    module.sow(ROUTING, _CHOICES, jnp.einsum("ble,bl->e", counts, counted))
    module.sow(ROUTING, _PROBABILITIES, jnp.einsum("ble,bl->e", p, counted))
    module.sow(ROUTING, _TOKENS, jnp.sum(counted))


def balance_loss(routing: Mapping[str, Any]) -> Array:
    """Return the load-balancing loss of a call, a float32 scalar.

    Args:
        routing: the collection `ROUTING` of the call.
    """
    sums: dict[str, Array] = {}
    for path, (leaf,) in paths.walk(routing):
        flat = leaf.reshape(-1, *leaf.shape[leaf.ndim - (path[-1] != _TOKENS) :]).sum(axis=0)
        sums[path[-1]] = sums[path[-1]] + flat if path[-1] in sums else flat
    tokens = jnp.maximum(sums[_TOKENS], 1.0)
    f, mean = sums[_CHOICES] / tokens, sums[_PROBABILITIES] / tokens
    return f.size * jnp.sum(f * mean)
