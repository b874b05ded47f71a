"""Per-layer embeddings: every layer also reads an embedding of the token that is its own.

With the word embedding `h [d]` of a token t, the input of layer i is

    e_i = (RMSNorm(W_i h / sqrt(d)) + sqrt(w) E_i[t]) / sqrt(2)

and after its feed-forward the layer adds

    y = x + RMSNorm(O (act(G x) * e_i))

with `W_i [w, d]`, `G [w, d]`, `O [d, w]`. One table holds the `E_i` of all layers, next to each
other, and one matrix the `W_i`: Gemma 3n and Gemma 4 (Gemma team 2025; they have no paper, the
equations are those of `transformers`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxpeft.models.activations import ACTIVATIONS
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.layers import RMSNorm, dense, mark_product, scaled
from jaxpeft.sharding.logical_axes import BATCH, HIDDEN, LENGTH, constrain

Array = jax.Array
TABLE = "embed_tokens_per_layer"


@dataclass(frozen=True)
class LayerEmbedding:
    """The sizes of per-layer embeddings.

    Attributes:
        vocab_size: number of tokens in the table.
        width: w, the width of a layer's embedding.
    """

    vocab_size: int
    width: int


def embed_for_layers(
    sizes: LayerEmbedding, layers: int, eps: float, options: ModelOptions, ids: Array, h: Array
) -> Array:
    """Return the `e_i` of all layers; it makes its modules in the scope of the calling one.

    Args:
        sizes: sizes of the embeddings.
        layers: number of layers.
        eps: of the norm.
        options: options of the model.
        ids: `[batch, length]`, the tokens.
        h: `[batch, length, d]`, their word embeddings, as the first layer gets them.

    Returns:
        `[layers, batch, length, w]`, of the dtype of the activations.
    """
    shape = (*ids.shape, layers, sizes.width)
    table = nn.Embed(sizes.vocab_size, layers * sizes.width, dtype=options.dtype, name=TABLE)
    own = table(ids)
    own = (own * jnp.asarray(math.sqrt(sizes.width), own.dtype)).reshape(shape)
    project = dense(layers * sizes.width, "per_layer_model_projection", options, bias=False)
    context = scaled(mark_product(project(h)), h.shape[-1] ** -0.5).reshape(shape)
    context = RMSNorm(eps, options.dtype, name="per_layer_projection_norm")(context)
    return jnp.moveaxis(scaled(context + own, 2**-0.5), 2, 0)


def add_layer_input(
    x: Array, e: Array, activation: str, eps: float, options: ModelOptions
) -> Array:
    """Return the `y` of a layer; it makes its modules in the scope of the calling one.

    Args:
        x: `[batch, length, d]`, the residual stream.
        e: `[batch, length, w]`, the layer's embeddings.
        activation: name of the activation.
        eps: of the norm.
        options: options of the model.
    """
    gate = dense(e.shape[-1], "per_layer_input_gate", options, bias=False)
    out = dense(x.shape[-1], "per_layer_projection", options, bias=False)
    h = ACTIVATIONS[activation](mark_product(gate(x))) * e
    h = RMSNorm(eps, options.dtype, name="post_per_layer_input_norm")(out(h))
    return constrain(x + h, BATCH, LENGTH, HIDDEN)
