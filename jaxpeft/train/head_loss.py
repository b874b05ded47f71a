r"""Cross-entropy of a language model, computed in chunks of positions, so that the full logits
never exist at once.

For logits `z` of a position with label `y`, `lse = log sum exp z`, label smoothing `e` and z-loss
weight `c`:

    loss = lse - (1 - e) z_y - e mean(z) + c lse^2
    dz   = (1 + 2 c lse) softmax(z) - (1 - e) onehot(y) - e / classes

The loss is the end of the forward pass, so a chunk's `dz` is known, up to a factor, as soon as its
logits are. It is backpropagated through the head immediately, and the logits are freed. Source: Hsu
et al. 2024, "Liger Kernel", section 3.2 (arXiv:2410.10989); label smoothing is Szegedy et al. 2015,
section 7 (arXiv:1512.00567), the z-loss Chowdhery et al. 2022, section 5 (arXiv:2204.02311).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxpeft.sharding.logical_axes import size_of
from jaxpeft.sharding.sizes import ROWS, SEQUENCE, TENSOR

Array = jax.Array
IGNORE = -100
MOST_LOGITS = 1 << 27
"""Logits per chunk: 256 MiB in bfloat16, and the same for their gradient."""


@dataclass(frozen=True)
class CrossEntropy:
    """A cross-entropy.

    Attributes:
        smoothing: label smoothing, in [0, 1).
        z_loss: weight of the squared log normalizer.
        softcap: caps logits by `cap tanh(z / cap)`, if the model's head does not do so itself; None
            for no cap.
    """

    smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None

    def cap(self, logits: Array) -> Array:
        """Return the capped logits in float32."""
        z = logits.astype(jnp.float32)
        return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)

    def losses(self, z: Array, labels: Array) -> Array:
        """Return the loss `[...]` per position.

        Args:
            z: capped logits, `[..., classes]`.
            labels: `[...]`, all in range.
        """
        lse = jax.nn.logsumexp(z, axis=-1)
        picked = jnp.take_along_axis(z, labels[..., None], axis=-1)[..., 0]
        out = lse - picked
        if self.smoothing:
            out = lse - (1 - self.smoothing) * picked - self.smoothing * jnp.mean(z, axis=-1)
        return out + self.z_loss * jnp.square(lse) if self.z_loss else out

    def sums(self, logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        """Sum the loss over the positions with a label.

        Args:
            logits: `[..., classes]`, floating.
            labels: `[...]` int32, -100 for no label.
            weights: broadcast to `labels`, float32.

        Returns:
            `(sum of weight * loss, sum of weight)`, float32 scalars; `(0, 0)` if no position has a
            label.
        """
        safe, counted = _weighted_labels(labels, weights)
        losses = self.losses(self.cap(logits), safe)
        # select, do not multiply: 0 * NaN is NaN
        return jnp.sum(jnp.where(counted > 0, losses * counted, 0.0)), jnp.sum(counted)

    def gradient(self, logits: Array, labels: Array, weights: Array) -> tuple[Array, Array]:
        """Return the loss sum of `sums` and its gradient with respect to the logits, float32."""
        safe, counted = _weighted_labels(labels, weights)
        z = self.cap(logits)
        lse = jax.nn.logsumexp(z, axis=-1, keepdims=True)
        total = jnp.sum(jnp.where(counted > 0, self.losses(z, safe) * counted, 0.0))
        classes = jnp.arange(z.shape[-1], dtype=labels.dtype)
        dz = jnp.exp(z - lse) * (1 + 2 * self.z_loss * lse) if self.z_loss else jnp.exp(z - lse)
        dz = dz - jnp.where(classes == safe[..., None], 1 - self.smoothing, 0.0)
        if self.smoothing:
            dz = dz - self.smoothing / z.shape[-1]
        if self.softcap is not None:
            dz = dz * (1 - jnp.square(z / self.softcap))
        return total, jnp.where(counted[..., None] > 0, dz * counted[..., None], 0.0)


def _weighted_labels(labels: Array, weights: Array) -> tuple[Array, Array]:
    """Return labels in range, and the weight of each position."""
    labeled = labels != IGNORE
    # replace the label before the gather: an out-of-range gather gives NaN, and 0 * NaN is NaN
    return jnp.where(labeled, labels, 0), jnp.where(
        labeled, jnp.broadcast_to(weights, labels.shape), 0.0
    )


def through_head(
    entropy: CrossEntropy,
    head: Callable[[Array, Array], Array],
    x: Array,
    labels: Array,
    weights: Array,
    most_logits: int = MOST_LOGITS,
) -> tuple[Array, Array]:
    """Sum the cross-entropy of a head's logits, from hidden states.

    Args:
        entropy: cross-entropy to compute.
        head: `(x [batch, n, d], chunk index) -> logits [batch, n, classes]`; arrays that it closes
            over are differentiated too.
        x: hidden states, `[batch, length, d]`.
        labels: `[batch, length]` int32, not shifted, -100 for no label.
        weights: broadcast to `labels`, float32.
        most_logits: maximum logits per chunk; a chunk has at least one position of each row.

    Returns:
        `(sum of weight * loss, sum of weight)`, float32 scalars.
    """
    (batch, length), weights = labels.shape, jnp.broadcast_to(weights, labels.shape)
    classes = jax.eval_shape(head, x[:, :1], jnp.zeros((), jnp.int32)).shape[-1]
    count, size, devices = _chunks(length, batch * classes, most_logits)

    def split(array: Array, fill: Any) -> Array:
        """Split into chunks, each with equally many positions from every sequence shard."""
        wide, rest = (
            [(0, 0), (0, count * size - length), *((0, 0),) * (array.ndim - 2)],
            array.shape[2:],
        )
        parts = jnp.pad(array, wide, constant_values=fill).reshape(
            batch, devices, count, size // devices, *rest
        )
        return jnp.moveaxis(parts, 2, 0).reshape(count, batch, size, *rest)

    chunks = (
        split(x, 0),
        split(labels, IGNORE),
        split(weights, 0.0),
        jnp.arange(count, dtype=jnp.int32),
    )
    run, closed = jax.closure_convert(head, chunks[0][0], chunks[3][0])

    @jax.custom_vjp
    def total(x: Array, closed: list[Array]) -> Array:
        def chunk(item: Any) -> Array:
            rows, labels, weights, i = item
            return entropy.sums(run(rows, i, *closed), labels, weights)[0]

        return jnp.sum(_map(chunk, (x, *chunks[1:])))

    def forward(x: Array, closed: list[Array]) -> tuple[Array, Any]:
        def chunk(item: Any) -> Any:
            rows, labels, weights, i = item
            logits, back = jax.vjp(lambda rows, *closed: run(rows, i, *closed), rows, *closed)
            own, dz = entropy.gradient(logits, labels, weights)
            dx, *dclosed = back(dz.astype(logits.dtype))
            return dx, own, dclosed

        if count == 1:
            dx, own, dclosed = chunk(jax.tree.map(lambda part: part[0], (x, *chunks[1:])))
            return own, (dx[None], dclosed)

        def step(carry: Any, item: Any) -> Any:
            dx, *sums = chunk(item)
            return jax.tree.map(jnp.add, carry, tuple(sums)), dx

        zero = jnp.zeros((), jnp.float32), [jnp.zeros_like(leaf) for leaf in closed]
        (own, dclosed), dx = jax.lax.scan(step, zero, (x, *chunks[1:]))
        return own, (dx, dclosed)

    def backward(residuals: Any, by: Array) -> Any:
        return jax.tree.map(lambda leaf: leaf * by.astype(leaf.dtype), residuals)

    total.defvjp(forward, backward)
    return total(chunks[0], closed), jnp.sum(_weighted_labels(labels, weights)[1])


def _chunks(length: int, logits: int, most: int) -> tuple[int, int, int]:
    """Return the number of chunks, the positions per chunk, and the number of sequence shards.

    Args:
        length: positions per row.
        logits: number of logits of one position of all rows.
        most: maximum logits per chunk and device.
    """
    devices = size_of(SEQUENCE) if length % size_of(SEQUENCE) == 0 else 1
    size = min(length, max(1, most * size_of(*ROWS, SEQUENCE, TENSOR) // logits))
    count = -(-length // size)
    if devices > 1:  # each chunk has equally many positions from each device
        count = next(
            n
            for n in range(min(count, length // devices), length + 1)
            if length // devices % n == 0
        )
    return count, -(-length // count), devices


def _map(run: Callable[[Any], Array], items: Any) -> Array:
    """Map over the leading axis, without a loop if its size is 1."""
    if len(items[0]) == 1:
        return run(jax.tree.map(lambda part: part[0], items))
    return jax.lax.map(run, items)
