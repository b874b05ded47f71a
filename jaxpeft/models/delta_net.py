r"""A gated delta net in place of a layer's attention: its state has a fixed size.

    q, k, v = silu(conv(x W_qkv)),    z = x W_z,    b = x W_b,    a = x W_a
    beta = sigmoid(b),    g = -exp(A_log) softplus(a + dt_bias)
    y = W_out(norm(delta_rule(q / (|q| sqrt(dk)), k / |k|, v, g, beta)) * silu(z))

(Yang et al. 2024, "Gated Delta Networks", section 3.4, arXiv:2412.06464). The convolution is that
of each channel alone, over the last positions. Several value heads may share a key head. Padding
and positions of other documents in a packed row have no effect.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.delta_rule import Steps, delta_rule
from jaxpeft.models.kv_cache import STATE, WINDOW, sow_state
from jaxpeft.models.layers import RMSNorm, dense, mark_product, residual_dense
from jaxpeft.models.masks import TextRows
from jaxpeft.remat import ATTENTION
from jaxpeft.sharding.logical_axes import BATCH, HEADS, HIDDEN, LENGTH, constrain

Array = jax.Array
_NORM_EPS = 1e-6


@dataclass(frozen=True)
class DeltaNet:
    """The sizes of a gated delta net.

    Attributes:
        key_heads: number of heads of queries and keys.
        value_heads: number of heads of values, a multiple of `key_heads`.
        key_dim: size of a query or key.
        value_dim: size of a value.
        window: number of positions of the convolution.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    window: int

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths of queries, keys and values."""
        keys = self.key_heads * self.key_dim
        return keys, keys, self.value_heads * self.value_dim


class ChannelConvolution(nn.Module):
    """A causal convolution of each channel alone: `y_t = sum over s of w_s x_{t - n + 1 + s}`.

    Attributes:
        window: n, the number of positions.
        dtype: dtype of the result; the sum is float32.
    """

    window: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, runs: Array | None) -> Array:
        """Convolve each run of a row.

        Args:
            x: `[batch, n - 1 + length, channels]`, with the positions before the row.
            runs: `[batch, length]`, see `TextRows`.

        Returns:
            `[batch, length, channels]`.
        """
        n, length = self.window, x.shape[1] - self.window + 1
        init = nn.initializers.lecun_normal(in_axis=0)
        kernel = self.param("kernel", init, (n, 1, x.shape[-1]), jnp.float32).astype(jnp.float32)
        if runs is not None:
            runs = jnp.pad(runs, ((0, 0), (n - 1, 0)), mode="edge")
        total: Any = 0.0
        for s in range(n):
            part = x[:, s : s + length].astype(jnp.float32) * kernel[s]
            if runs is not None:
                same = runs[:, s : s + length] == runs[:, n - 1 :]
                part = jnp.where(same[..., None], part, 0.0)
            total = total + part
        return total.astype(self.dtype)


class GatedDeltaNet(nn.Module):
    """The gated delta net of a layer."""

    net: DeltaNet
    features: int
    activation: str
    eps: float
    options: ModelOptions

    @nn.compact
    def __call__(
        self,
        x: Array,
        residual: Array,
        finish: Callable[[Array], Array],
        cached: dict[str, Array] | None,
        rows: TextRows,
    ) -> Array:
        """Map `x [batch, length, d]`, and add it to the residual stream.

        Args:
            x: the normalized residual stream.
            residual: `x` before the norm.
            finish: what is applied to the result before the sum.
            cached: window and state before the row, see `Cache`; None for a row's begin.
            rows: padding and documents.
        """
        n, batch = self.net, x.shape[0]
        qkv, z, b, a = self._project(x)
        before = (
            jnp.zeros((batch, n.window - 1, qkv.shape[-1]), qkv.dtype)
            if cached is None
            else cached[WINDOW]
        )
        qkv = jnp.concatenate([before, rows.without_padding(qkv)], axis=1)
        mixed = ChannelConvolution(n.window, self.options.dtype, name="conv1d")(qkv, rows.runs)
        steps = self._steps(ACTIVATIONS[self.activation](mixed), b, a, rows)
        state = (
            jnp.zeros((batch, n.value_heads, n.key_dim, n.value_dim), jnp.float32)
            if cached is None
            else cached[STATE]
        )
        out, state = delta_rule(steps, state, rows.runs)
        sow_state(self, rows.last(qkv, n.window - 1), state)
        out = checkpoint_name(constrain(out, BATCH, None, HEADS, None), ATTENTION)
        out = RMSNorm(self.eps, jnp.float32, name="norm")(out)
        out = (out.reshape(z.shape) * jax.nn.silu(z.astype(jnp.float32))).astype(x.dtype)
        out_proj = residual_dense(self.features, "out_proj", self.options, bias=False)
        out = out_proj.join(finish(out_proj(out)), residual)
        return mark_product(constrain(out, BATCH, LENGTH, HIDDEN))

    def _project(self, x: Array) -> tuple[Array, Array, Array, Array]:
        """Return queries, keys and values together, and the inputs of the three gates.

        All have all positions and channels on every device: channels of one device would not be
        those of a head, and a position needs the state of the one before.
        """
        n = self.net
        names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")
        widths = (sum(n.widths), n.widths[2], n.value_heads, n.value_heads)
        first, *others = (
            dense(width, name, self.options, bias=False)
            for name, width in zip(names, widths, strict=True)
        )
        outputs = first.together(x, *others)
        return tuple(constrain(mark_product(y), BATCH, None, None) for y in outputs)  # pyright: ignore[reportReturnType]

    def _steps(self, mixed: Array, b: Array, a: Array, rows: TextRows) -> Steps:
        """Return the arguments of the delta rule, by heads."""
        n = self.net
        mixed, b, a = (y.astype(jnp.float32) for y in (mixed, b, a))
        at = (n.widths[0], n.widths[0] + n.widths[1])
        q, k, v = (
            y.reshape(*y.shape[:2], -1, d)
            for y, d in zip(
                jnp.split(mixed, at, axis=-1), (n.key_dim, n.key_dim, n.value_dim), strict=True
            )
        )
        q, k = (jnp.repeat(_unit(y), n.value_heads // n.key_heads, axis=2) for y in (q, k))
        leaf = (n.value_heads,)
        rate = jnp.exp(self.param("A_log", _log_rates, leaf, jnp.float32).astype(jnp.float32))
        shift = self.param("dt_bias", nn.initializers.ones, leaf, jnp.float32)
        g = -rate * jax.nn.softplus(a + shift.astype(jnp.float32))
        found = Steps(
            q * n.key_dim**-0.5,
            k,
            v,
            rows.without_padding(g),
            rows.without_padding(jax.nn.sigmoid(b)),
        )
        return jax.tree.map(
            lambda y: constrain(y, BATCH, None, HEADS, *(None,) * (y.ndim - 3)), found
        )


def _unit(x: Array) -> Array:
    """Return vectors of length 1 along the last axis."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), -1, keepdims=True) + _NORM_EPS)


def _log_rates(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Return the logarithms of rates of decay from 0.01 to 16."""
    return jnp.log(jax.random.uniform(key, shape, dtype, 0.01, 16.0))
