"""Attention: what a position may see, and the product with it by the fastest kernel that fits.

Three kernels compute `softmax(q k^T / sqrt(d)) v`, scores and softmax in float32. `xla` writes all scores out; `cudnn` (NVIDIA's, on
GPUs) and `splash` (JAX's own, on TPUs) never do: Dao et al. 2022, "FlashAttention", section 3 (arXiv:2205.14135).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxpeft.models.base import PAST, Options
from jaxpeft.models.layers import dropout

Array = jax.Array


@partial(jax.tree_util.register_dataclass, data_fields=["dense", "text", "segments"], meta_fields=["causal", "window"])
@dataclass(frozen=True)
class Mask:
    """Which position may attend to which: all that the parts allow.

    Attributes:
        dense: bool, broadcast to `[batch, 1, query, key]`; None where everything is allowed.
        text: bool `[batch, key]`: which keys are seen; None for all.
        segments: `[batch, length]`: a position sees its own segment only; None where rows are whole. Queries and keys are then the same
            positions, and so they are where `causal`.
        causal: whether a position sees only itself and those before it.
        window: how many positions back, itself included, where `causal`; 0 for all.
    """

    dense: Array | None = None
    text: Array | None = None
    segments: Array | None = None
    causal: bool = False
    window: int = 0

    def given(self) -> Array | None:
        """Gives what depends on the rows as one array, broadcast to `[batch, 1, query, key]`; None where everything is allowed."""
        parts = [] if self.dense is None else [self.dense]
        if self.text is not None:
            parts.append(self.text[:, None, None, :])
        if self.segments is not None:
            parts.append((self.segments[:, :, None] == self.segments[:, None, :])[:, None])
        found: Array | None = None
        for part in parts:
            found = part if found is None else found & part
        return found

    def full(self, length: int) -> Array | None:
        """Gives all of it as one array, broadcast to `[batch, 1, query, key]`; None where everything is allowed."""
        given = self.given()
        if not self.causal:
            return given
        seen = jnp.tril(jnp.ones((1, 1, length, length), bool))
        if self.window:
            seen = seen & ~jnp.tril(seen, -self.window)
        return seen if given is None else seen & given

    def ready(self, kernel: str, length: int) -> Mask:
        """Gives the same as a kernel takes it, made once for all layers."""
        return Mask(self.full(length)) if kernel == "xla" else self

    def within(self, near: Array) -> Mask:
        """Narrows it to where `near`, bool, broadcast to `[batch, 1, query, key]`, is true."""
        return dataclasses.replace(self, dense=near if self.dense is None else self.dense & near)


def allowed(attention_mask: Array | None, segment_ids: Array | None, *, causal: bool, window: int = 0) -> Mask:
    """Says which position may attend to which.

    Args:
        attention_mask: `[batch, length]`, 1 for a token; None for tokens alone.
        segment_ids: `[batch, length]`; a position sees its own segment only.
        causal: whether a position sees only itself and those before it.
        window: how many positions back, itself included; 0 for all.
    """
    text = None if attention_mask is None else attention_mask.astype(bool)
    return Mask(None, text, segment_ids, causal, window)


@dataclass(frozen=True)
class Virtual:
    """Positions in front of a row's tokens that no token stands at; every token sees them, in each segment of a packed row.

    Attributes:
        past: `[layers, 2, batch or 1, n, kv_heads * d]`: the keys (rotated already) and values of each layer; or None.
        prompt: `[batch or 1, n, hidden]`: embeddings that run through all layers; or None.
    """

    past: Array | None = None
    prompt: Array | None = None

    @property
    def count(self) -> int:
        """How many positions they take."""
        return sum(part.shape[-2] for part in (self.past, self.prompt) if part is not None)

    @property
    def prompted(self) -> int:
        """How many of them run through the layers."""
        return 0 if self.prompt is None else self.prompt.shape[-2]

    def prepend(self, x: Array) -> Array:
        """Puts the prompt in front of embeddings `[batch, length, hidden]`."""
        if self.prompt is None:
            return x
        prompt = jnp.broadcast_to(self.prompt.astype(x.dtype), (x.shape[0], *self.prompt.shape[-2:]))
        return jnp.concatenate([prompt, x], axis=1)

    def positions(self, where: Array) -> Array:
        """Gives the positions of prompt and tokens `[batch, prompted + length]`, from the tokens' own, which are shifted."""
        where = where + self.count
        if self.prompt is None:
            return where
        own = jnp.arange(self.count - self.prompted, self.count, dtype=where.dtype)
        return jnp.concatenate([jnp.broadcast_to(own, (where.shape[0], self.prompted)), where], axis=1)

    def mask(self, mask: Mask, length: int) -> Mask:
        """Widens what tokens may attend to by the virtual positions, which every query sees but a prompt's its future.

        Args:
            mask: of the tokens.
            length: of the tokens.

        Returns:
            That of `[batch, 1, prompted + length, count + length]`.
        """
        seen = mask.full(length) if self.count else None
        if seen is None:
            return mask
        lead = seen.shape[:2]
        seen = jnp.broadcast_to(seen, (*lead, length, length))
        past = self.count - self.prompted
        if self.prompted:
            # a prompt sees the tokens that the last query sees: all but padding, where rows are no documents
            after = (
                jnp.zeros((*lead, self.prompted, length), bool)
                if mask.causal
                else seen[:, :, -1:].repeat(self.prompted, 2)
            )
            seen = jnp.concatenate([after, seen], axis=2)
            own = jnp.ones((self.prompted + length, self.prompted), bool)
            own = jnp.tril(own) if mask.causal else own
            seen = jnp.concatenate([jnp.broadcast_to(own, (*lead, *own.shape)), seen], axis=3)
        return Mask(jnp.concatenate([jnp.ones((*seen.shape[:3], past), bool), seen], axis=3))

    def places(self, segment_ids: Array | None, length: int) -> Array:
        """Gives the place of each key, `[batch or 1, count + length]`: virtual positions, then tokens, in each segment anew."""
        own = positions(segment_ids, 1 if segment_ids is None else segment_ids.shape[0], length) + self.count
        front = jnp.broadcast_to(jnp.arange(self.count, dtype=own.dtype), (own.shape[0], self.count))
        return jnp.concatenate([front, own], axis=1)


def before(module: nn.Module, past: Array | None, k: Array, v: Array) -> tuple[Array, Array]:
    """Puts keys and values of virtual positions in front of a layer's own.

    Args:
        module: the attention, which keeps its own keys and values for a caller that asks for them.
        past: `[2, batch or 1, n, kv_heads * d]`, or None.
        k: `[batch, length, kv_heads, d]`, rotated.
        v: likewise, not rotated.
    """
    if module.is_mutable_collection(PAST) and not module.is_initializing():
        module.sow(PAST, "kv", jnp.stack([k, v]).reshape(2, *k.shape[:2], -1))
    if past is None:
        return k, v
    own = jnp.broadcast_to(past.astype(k.dtype), (2, k.shape[0], *past.shape[2:]))
    own = own.reshape(*own.shape[:3], *k.shape[2:])
    return jnp.concatenate([own[0], k], axis=1), jnp.concatenate([own[1], v], axis=1)


def positions(segment_ids: Array | None, batch: int, length: int) -> Array:
    """Gives `[batch, length]` positions that count from zero, in each segment anew."""
    index = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    if segment_ids is None:
        return index
    begins = jnp.concatenate([jnp.ones((batch, 1), bool), segment_ids[:, 1:] != segment_ids[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def attend(
    module: nn.Module, kernel: str, q: Array, k: Array, v: Array, mask: Mask, dropout_rate: float = 0.0
) -> Array:
    """Scaled dot-product attention; several query heads may share a key head (Ainslie et al. 2023).

    Args:
        module: whose dropout key is used.
        kernel: a key of `KERNELS`; where it does not fit the call, `xla` computes it.
        q: `[batch, query, heads, d]`.
        k: `[batch, key, kv_heads, d]`, kv_heads divides heads.
        v: `[batch, key, kv_heads, d]`.
        mask: a row that may see nothing gives an average, not NaN.
        dropout_rate: on the attention weights.

    Returns:
        `[batch, query, heads * d]`.
    """
    rate = dropout_rate if module.has_rng("dropout") else 0.0
    if KERNELS[kernel].lacks(q.dtype, q.shape[-1], rate) or not KERNELS[kernel].takes(q, k, mask):
        kernel = "xla"
    drop = partial(dropout, module, dropout_rate)
    out = KERNELS[kernel].compute(q, k, v, mask, drop)
    return checkpoint_name(out.reshape(*q.shape[:2], -1), "attention")


@dataclass(frozen=True)
class AttentionKernel:
    """One way to compute attention.

    Attributes:
        compute: `(q, k, v, mask, dropout of the weights) -> [batch, query, heads, d]`.
        platform: that it is for; empty for all.
        lacks: says why it does not fit a model, from the activations' dtype, the size of a head and the rate of dropout; empty if it does.
        takes: says whether it fits a call, from `q`, `k` and the mask.
    """

    compute: Callable[[Array, Array, Array, Mask, Callable[[Array], Array]], Array]
    platform: str = ""
    lacks: Callable[[Any, int, float], str] = lambda dtype, size, rate: ""
    takes: Callable[[Array, Array, Mask], bool] = lambda q, k, mask: True


def _xla(q: Array, k: Array, v: Array, mask: Mask, drop: Callable[[Array], Array]) -> Array:
    batch, length, heads, d = q.shape
    seen = mask.full(length)
    # Heads before length: both products are then plain batched matmuls, a fifth faster on CPU than the other order.
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, d)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32) * (d**-0.5)
    scores = scores.reshape(batch, heads, length, keys)
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = drop(jax.nn.softmax(scores, axis=-1)).astype(v.dtype)
    out = jnp.einsum("bhts,bhsd->bhtd", weights.reshape(batch, kv_heads, -1, keys), v)
    return jnp.swapaxes(out.reshape(batch, heads, length, d), 1, 2)


def _cudnn(q: Array, k: Array, v: Array, mask: Mask, drop: Callable[[Array], Array]) -> Array:
    del drop
    window = (mask.window - 1, 0) if mask.window else None
    dense = mask.given()
    if dense is not None:
        dense = jnp.broadcast_to(dense, (*dense.shape[:2], q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(
        q, k, v, mask=dense, is_causal=mask.causal, local_window_size=window, implementation="cudnn"
    )


def _cudnn_lacks(dtype: Any, size: int, rate: float) -> str:
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if size > 128 or size % 8:
        return f"a head has {size} numbers, not a multiple of 8 up to 128"
    return f"attention dropout is {rate}" if rate else ""


_SPLASH_BLOCK = 512


def _splash(
    q: Array, k: Array, v: Array, mask: Mask, drop: Callable[[Array], Array], *, interpret: bool = False
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del drop
    length, heads, d = q.shape[1:]
    seen = masks.FullMask((length, length))
    if mask.causal:
        shape = (length, length)
        seen = masks.LocalMask(shape, (mask.window - 1, 0), 0) if mask.window else masks.CausalMask(shape)
    block = next(size for size in (_SPLASH_BLOCK, 256, 128) if length % size == 0)
    fields = (field.name for field in dataclasses.fields(splash.BlockSizes))
    sizes: Any = {name: block for name in fields if name.startswith("block_")}
    attention = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([seen] * heads), block_sizes=splash.BlockSizes(**sizes),
        residual_checkpoint_name="attention", interpret=interpret,
    )  # fmt: skip
    ids = mask.segments
    if mask.text is not None:
        # padding sees padding: no row may see nothing
        ids = jnp.where(mask.text, 1 if ids is None else ids + 1, 0)
    segments = None if ids is None else splash.SegmentIds(ids.astype(jnp.int32), ids.astype(jnp.int32))
    q = q * jnp.asarray(d**-0.5, q.dtype)
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    out: Any = jax.vmap(attention, in_axes=(0, 0, 0, None if segments is None else 0))(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _splash_lacks(dtype: Any, size: int, rate: float) -> str:
    if size % 64:
        return f"a head has {size} numbers, not a multiple of 64"
    return f"attention dropout is {rate}" if rate else ""


def _splash_takes(q: Array, k: Array, mask: Mask) -> bool:
    return mask.dense is None and q.shape[1] == k.shape[1] and q.shape[1] % 128 == 0


KERNELS: Mapping[str, AttentionKernel] = {
    "xla": AttentionKernel(_xla),
    "cudnn": AttentionKernel(
        _cudnn, "cuda", _cudnn_lacks, lambda q, k, mask: mask.given() is None or not (q.shape[1] % 2 or k.shape[1] % 2)
    ),
    "splash": AttentionKernel(_splash, "tpu", _splash_lacks, _splash_takes),
}
"""Every kernel by its name in configs."""


def platform(device: Any) -> str:
    """Gives the platform of a device: `cpu`, `tpu`, `cuda` or `rocm`."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def fastest(platform: str) -> str:
    """Gives the kernel to try first on a platform: `cuda`, `rocm`, `tpu` or `cpu`."""
    return next((name for name, kernel in KERNELS.items() if kernel.platform == platform), "xla")


def lacks(options: Options, config: Any) -> str:
    """Says why the kernel that a model is to attend with does not fit it; empty if it does.

    Args:
        options: of the model.
        config: its architecture.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KERNELS[options.attention].lacks(options.dtype, size, getattr(config, "attention_dropout", 0.0))
