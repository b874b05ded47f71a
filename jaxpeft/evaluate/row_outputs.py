"""Outputs of a model for rows: logits of a classifier, token losses of a language model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxpeft.core.paths import Tree
from jaxpeft.data.batches.training import eval_batches
from jaxpeft.data.chat.supervise import IGNORED
from jaxpeft.data.tokens.token_arrays import Encoded
from jaxpeft.errors import DataError
from jaxpeft.inference.adapted_model import AdaptedModel
from jaxpeft.processes.arrays import put_batch
from jaxpeft.sharding.logical_axes import on_mesh
from jaxpeft.sharding.mesh import replicated_sharding
from jaxpeft.sharding.sizes import row_shards
from jaxpeft.train.head_loss import MOST_LOGITS, CrossEntropy
from jaxpeft.train.outputs import Batch, Outputs

Array = np.ndarray


@dataclass(frozen=True)
class Runner:
    """Runs a model on batches of rows.

    Attributes:
        loaded: the model.
        batch_size: sequences per batch, rounded up to a multiple of the devices.
        pad_id: the padding token id.
    """

    loaded: AdaptedModel
    batch_size: int
    pad_id: int

    def logits(self, params: Tree, encoded: Encoded) -> list[Array]:
        """Return the logits of each sequence: float32 [labels], or [length, labels] of tokens."""
        model = self.loaded.model
        found: list[Any] = [None] * len(encoded)
        run = self._compile(lambda params, batch: Outputs(model, params, batch, None).logits)
        for batch, rows in self._batches(encoded):
            out = np.asarray(run(params, batch))
            for at, row in enumerate(rows.tolist()):
                if row >= 0:
                    size = int(encoded.lengths[row])
                    found[row] = out[at, :size] if encoded.per_token else out[at]
        return found

    def losses(self, params: Tree, encoded: Encoded) -> Array:
        """Return the sum of the token losses of each sequence in nats, float64 [sequences]."""
        model = self.loaded.model
        run = self._compile(lambda params, batch: _losses(Outputs(model, params, batch, None)))
        return self._sums(lambda batch: run(params, batch), encoded)

    def divergences(self, params: Tree, other: Tree, encoded: Encoded) -> Array:
        """Return the sum over tokens of the Kullback-Leibler divergence of the next-token
        distribution of a model from another's, KL(other, model), in nats, float64 [sequences].
        """
        model = self.loaded.model

        def compute(params: Tree, other: Tree, batch: Batch) -> jax.Array:
            own, base = (Outputs(model, tree, batch, None) for tree in (params, other))
            return _divergences(own, base)

        run = self._compile(compute)
        return self._sums(lambda batch: run(params, other, batch), encoded)

    def _sums(self, run: Callable[[Any], Any], encoded: Encoded) -> Array:
        sums = np.zeros(len(encoded))
        for batch, rows in self._batches(encoded):
            sums[rows[rows >= 0]] = np.asarray(run(batch), np.float64)[rows >= 0]
        if not np.isfinite(sums).all():
            bad = int((~np.isfinite(sums)).sum())
            raise DataError(
                f"the loss of {bad} of {len(sums)} sequences is not finite: the model has diverged"
            )
        return sums

    def _batches(self, encoded: Encoded) -> Iterator[tuple[Any, Array]]:
        mesh = self.loaded.mesh
        over = 1 if mesh is None else row_shards(mesh.shape)
        size = -(-min(self.batch_size, len(encoded)) // over) * over
        for batch, rows in eval_batches(encoded, size, pad_id=self.pad_id):
            yield (batch if mesh is None else put_batch(mesh, batch)), rows

    def _compile(self, run: Callable[..., jax.Array]) -> Callable[..., Any]:
        mesh = self.loaded.mesh
        where = None if mesh is None else replicated_sharding(mesh)
        return jax.jit(on_mesh(mesh, run), out_shardings=where)


def _losses(outputs: Outputs) -> jax.Array:
    """Return the sum of each row's token losses, float32 [rows]."""

    def chunk(hidden: jax.Array, labels: jax.Array) -> jax.Array:
        logits = outputs.head(hidden, jnp.zeros((), jnp.int32))
        return CrossEntropy().losses(logits.astype(jnp.float32), jnp.maximum(labels, 0))

    return _sum_chunks(chunk, outputs, (outputs.hidden,))


def _divergences(own: Outputs, base: Outputs) -> jax.Array:
    """Return the sum of each row's divergences of the next token, float32 [rows]."""

    def chunk(hidden: jax.Array, reference: jax.Array, labels: jax.Array) -> jax.Array:
        del labels
        zero = jnp.zeros((), jnp.int32)
        p, q = (
            jax.nn.log_softmax(which.head(x, zero).astype(jnp.float32), axis=-1)
            for which, x in ((base, reference), (own, hidden))
        )
        return jnp.sum(jnp.exp(p) * (p - q), axis=-1)

    return _sum_chunks(chunk, own, (own.hidden, base.hidden))


def _sum_chunks(
    chunk: Callable[..., jax.Array], outputs: Outputs, arrays: tuple[jax.Array, ...]
) -> jax.Array:
    """Sum values of positions over each row, in chunks of positions, so that the full logits never
    exist at once.

    Args:
        chunk: computes the values of positions, [rows, n], from the arrays and the next labels.
        outputs: outputs of the batch.
        arrays: hidden states, [rows, length, d].
    """
    labels = outputs.batch["labels"]
    following = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORED)
    rows, length = labels.shape
    classes = jax.eval_shape(outputs.head, arrays[0][:, :1], jnp.zeros((), jnp.int32)).shape[-1]
    size = min(length, max(1, MOST_LOGITS // (rows * classes)))
    count = -(-length // size)

    def split(array: jax.Array, fill: int) -> jax.Array:
        wide = [(0, 0), (0, count * size - length), *((0, 0),) * (array.ndim - 2)]
        parts = jnp.pad(array, wide, constant_values=fill)
        return jnp.moveaxis(parts.reshape(rows, count, size, *array.shape[2:]), 1, 0)

    def total(items: tuple[jax.Array, ...]) -> jax.Array:
        return jnp.where(items[-1] == IGNORED, 0.0, chunk(*items)).sum(-1)

    parts = (*(split(array, 0) for array in arrays), split(following, IGNORED))
    return jax.lax.map(total, parts).sum(0)


def loss_tokens(encoded: Encoded) -> Array:
    """Return the number of tokens in the loss of each sequence, int [sequences]."""
    return np.bincount(_sequence_of(encoded)[_in_loss(encoded)], minlength=len(encoded))


def loss_bytes(encoded: Encoded, tokenizer: Any) -> Array:
    """Return the number of bytes, in UTF-8, of the text of each sequence's tokens in the loss,
    int [sequences]; special tokens have none.
    """
    found = np.zeros(len(encoded), np.int64)
    in_loss = _in_loss(encoded)

    def size(tokens: Array) -> int:
        text = tokenizer.decode(
            tokens.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return len(text.encode())

    for row in range(len(encoded)):
        at = slice(*encoded.offsets[row : row + 2].tolist())
        tokens, inside = encoded.tokens[at], np.concatenate([[False], in_loss[at], [False]])
        edges = np.flatnonzero(np.diff(inside.astype(np.int8)))
        # a text's size is a difference, since a tokenizer may decode a token without its space
        found[row] = sum(
            size(tokens[:stop]) - size(tokens[:start])
            for start, stop in zip(edges[::2], edges[1::2], strict=True)
        )
    return found


def by_row(values: Array, encoded: Encoded, kept: Array) -> Array:
    """Add up values of sequences over each row that is kept, [kept]."""
    total = np.bincount(encoded.source, values, int(encoded.source.max(initial=0)) + 1)
    return total[kept].astype(values.dtype)


def _in_loss(encoded: Encoded) -> Array:
    """Return which tokens are predicted and in the loss, bool [tokens]; a first token never is."""
    found = encoded.labels != IGNORED
    found[encoded.offsets[:-1][encoded.lengths > 0]] = False
    return found


def _sequence_of(encoded: Encoded) -> Array:
    return np.repeat(np.arange(len(encoded)), encoded.lengths)


def token_positions(logits: list[Array], encoded: Encoded) -> tuple[Array, Array, Array]:
    """Return the logits [positions, tags], the true tags and the row of each labeled position of
    a token classification.
    """
    labeled = encoded.labels != IGNORED
    flat = np.concatenate(logits)[labeled]
    return flat, encoded.labels[labeled], encoded.source[_sequence_of(encoded)][labeled]
