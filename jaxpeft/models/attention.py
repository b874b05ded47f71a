"""Attention with the fastest applicable kernel.

Four kernels compute `softmax(q k^T / sqrt(d)) v`, or the same with another scale and with bounded
scores (`Scoring`); scores and softmax are float32. `xla` materializes all scores; `cudnn`
(NVIDIA's, on GPUs) and `splash` (JAX's own, on TPUs) do not: Dao et al. 2022, "FlashAttention",
section 3 (arXiv:2205.14135). Neither does `chunked`, which runs on all platforms and supports
positions sharded over devices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxpeft.errors import ConfigError
from jaxpeft.models import chunked_attention, decode_attention
from jaxpeft.models.attention_scores import Scoring, softmax
from jaxpeft.models.base import ModelOptions
from jaxpeft.models.layers import dropout
from jaxpeft.models.masks import Mask
from jaxpeft.remat import ATTENTION
from jaxpeft.sharding.logical_axes import (
    BATCH,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LENGTH,
    constrain,
    mesh_of,
    size_of,
    spec_of,
)
from jaxpeft.sharding.sizes import SEQUENCE, TENSOR

Array = jax.Array
Sizes = tuple[int, int]
"""The sizes of a key head, which is that of a query head, and of a value head."""


def by_heads(qkv: Iterable[Array]) -> tuple[Array, ...]:
    """Constrain the sharding of queries, and of keys and values if there are some.

    Args:
        qkv: arrays `[batch, length, heads, d]`, queries first.
    """
    q, *others = qkv
    keys = (constrain(array, BATCH, LENGTH, KV_HEADS, HEAD_DIM) for array in others)
    return constrain(q, BATCH, LENGTH, HEADS, HEAD_DIM), *keys


def attend(
    module: nn.Module,
    kernel: str,
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    dropout_rate: float = 0.0,
    cached: tuple[Array, Array] | None = None,
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    bias: Array | None = None,
    sinks: Array | None = None,
) -> Array:
    """Scaled dot-product attention; several query heads may share a key head (Ainslie et al. 2023).

    Args:
        module: module whose dropout key is used.
        kernel: a key of `KERNELS`; `xla` is used if it does not support the call.
        q: `[batch, query, heads, d]`.
        k: `[batch, key, kv_heads, d]`, kv_heads divides heads.
        v: `[batch, key, kv_heads, e]`.
        mask: the mask; a query with no visible key yields an average, not NaN, or with sinks zeros.
        dropout_rate: dropout rate of the attention weights.
        cached: keys `[batch, kv_heads, slots, d]` and values `[batch, kv_heads, slots, e]` of a KV
            cache, before `k` and `v` in the mask's order; or None.
        scoring: how scores become logits.
        bias: float32 `[batch, heads, query, key]`, added to the logits by the kernel `xla`, which
            is then used; or None.
        sinks: `[heads]`, see `attention_scores.softmax`; None if `scoring` has none.

    Returns:
        `[batch, query, heads * e]`.
    """
    if cached is not None:
        own = KERNELS[kernel].platform == "cuda" and mesh_of() is None
        fast = own and decode_attention.takes(q, k, *cached, scoring)
        run = decode_attention.compute if fast else _with_cache
        return run(q, k, v, mask, *cached, scoring, sinks).reshape(*q.shape[:2], -1)
    rate = dropout_rate if module.has_rng("dropout") else 0.0
    spread = size_of(SEQUENCE) > 1
    if spread and kernel != "xla":
        kernel = "chunked"
    chosen = KERNELS[kernel]
    fits = bias is None and chosen.takes(q, k, mask)
    if not fits or chosen.lacks(q.dtype, (q.shape[-1], v.shape[-1]), rate, scoring):
        kernel = "xla"
    drop = partial(dropout, module, dropout_rate)
    if kernel == "xla" and spread:
        out = _xla_by_positions(q, k, v, mask, drop, scoring, sinks, bias)
    elif bias is not None:
        out = _xla(q, k, v, mask, drop, scoring, sinks, bias)
    elif kernel == "xla" or mesh_of() is None:
        out = KERNELS[kernel].compute(q, k, v, mask, drop, scoring, sinks)
    else:
        out = _on_each(KERNELS[kernel].compute, q, k, v, mask, drop, scoring, sinks)
    return checkpoint_name(out.reshape(*q.shape[:2], -1), ATTENTION)


@dataclass(frozen=True)
class AttentionKernel:
    """An implementation of attention.

    Attributes:
        compute: `(q, k, v, mask, dropout of the weights, scoring, sinks) -> ` the result `[batch,
            query, heads, e]`.
        platform: its platform; empty for all.
        lacks: `(dtype of activations, sizes, dropout rate, scoring) -> ` the reason why it does not
            support a model; empty if it does.
        takes: `(q, k, mask) -> ` whether it supports a call.
    """

    compute: Callable[..., Array]
    platform: str = ""
    lacks: Callable[[Any, Sizes, float, Scoring], str] = lambda dtype, sizes, rate, scoring: ""
    takes: Callable[[Array, Array, Mask], bool] = lambda q, k, mask: True


def _xla(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array],
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    batch, length, heads, d = q.shape
    seen = mask.to_array(length)
    # Heads before length: both products are then plain batched matmuls, a fifth faster on CPU than
    # the other order.
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, d)
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k, preferred_element_type=jnp.float32)
    scores = scoring.logits(scores, d).reshape(batch, heads, length, keys)
    scores = scores if bias is None else scores + bias
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    weights = drop(softmax(scores, sinks)).astype(v.dtype)
    out = jnp.einsum("bhts,bhsd->bhtd", weights.reshape(batch, kv_heads, -1, keys), v)
    return jnp.swapaxes(out.reshape(batch, heads, length, -1), 1, 2)


def _with_cache(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    old_keys: Array,
    old_values: Array,
    scoring: Scoring,
    sinks: Array | None,
) -> Array:
    """Attend to the keys of a KV cache and of the call, without joining them in memory."""
    batch, length, heads, d = q.shape
    kv_heads, slots = old_keys.shape[1:3]
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    q = q.reshape(batch, kv_heads, heads // kv_heads * length, d)
    old_scores, scores = (
        jnp.einsum("bhtd,bhsd->bhts", q, keys, preferred_element_type=jnp.float32)
        for keys in (old_keys, k)
    )
    # without the barrier, XLA computes the rotations of q and k again for each of the scores
    scores = jax.lax.optimization_barrier(scores)
    joined = scoring.logits(jnp.concatenate([old_scores, scores], axis=-1), d)
    joined = joined.reshape(batch, heads, length, -1)
    seen = mask.to_array(length)
    if seen is not None:
        joined = jnp.where(seen, joined, jnp.finfo(jnp.float32).min)
    weights = softmax(joined, sinks).astype(v.dtype)
    weights = weights.reshape(batch, kv_heads, -1, weights.shape[-1])
    out = jnp.einsum("bhts,bhsd->bhtd", weights[..., :slots], old_values)
    out += jnp.einsum("bhts,bhsd->bhtd", weights[..., slots:], v)
    return jnp.swapaxes(out.reshape(batch, heads, length, -1), 1, 2)


def _xla_by_positions(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array],
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
    bias: Array | None = None,
) -> Array:
    """Attend with positions sharded over devices: local queries, and keys and values of all
    positions.
    """
    batch, length, heads, d = q.shape
    seen = mask.to_array(length)
    k, v = (constrain(array, BATCH, None, KV_HEADS, HEAD_DIM) for array in (k, v))
    # keep positions as a separate dimension: merged with heads, it could not be sharded
    q = q.reshape(batch, length, k.shape[2], -1, d)
    scores = jnp.einsum("btkgd,bskd->bkgts", q, k, preferred_element_type=jnp.float32)
    scores = scoring.logits(scores, d).reshape(batch, heads, length, -1)
    scores = scores if bias is None else scores + bias
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
    scores = constrain(scores, BATCH, HEADS, LENGTH, None)
    weights = drop(softmax(scores, sinks)).astype(v.dtype)
    weights = weights.reshape(batch, k.shape[2], -1, length, k.shape[1])
    return jnp.einsum("bkgts,bskd->btkgd", weights, v).reshape(batch, length, heads, -1)


def _on_each(
    compute: Callable[..., Array],
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array],
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
) -> Array:
    """Attend with a kernel that XLA cannot partition: each device computes its own rows, heads and
    queries with all keys.
    """
    across = size_of(TENSOR)
    if q.shape[2] % across == 0 and across % k.shape[2] == 0:
        # fewer key heads than devices: repeat them so that each device has the one it needs
        k, v = (jnp.repeat(array, across // k.shape[2], axis=2) for array in (k, v))
    together = q.shape[2] % across == 0 and k.shape[2] % across == 0
    along = HEADS if together else None
    spec = spec_of(q.shape, BATCH, LENGTH, along, None)
    each = spec_of(k.shape, BATCH, None, along, None)

    def rows(leaf: Array) -> PartitionSpec:
        return PartitionSpec(spec[0] if leaf.shape[0] == q.shape[0] else None)

    spread = size_of(SEQUENCE) > 1 and spec[1] is not None

    def here(q: Array, k: Array, v: Array, mask: Mask, sinks: Array | None) -> Array:
        if not spread:
            return compute(q, k, v, mask, drop, scoring, sinks)
        first = jax.lax.axis_index(SEQUENCE) * q.shape[1]
        return compute(q, k, v, mask, drop, scoring, sinks, first=first)

    run = jax.shard_map(
        here,
        in_specs=(spec, each, each, jax.tree.map(rows, mask), PartitionSpec(spec[2])),
        out_specs=spec,
        check_vma=False,
    )
    return run(q, k, v, mask, sinks)


def _cudnn(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array],
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
) -> Array:
    del drop, sinks
    window = (mask.window - 1, 0) if mask.window else None
    dense = mask.row_mask()
    if dense is not None:
        dense = jnp.broadcast_to(dense, (*dense.shape[:2], q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        mask=dense,
        scale=scoring.scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )


def _cudnn_lacks(dtype: Any, sizes: Sizes, rate: float, scoring: Scoring) -> str:
    size, of_values = sizes
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"activations are {jnp.dtype(dtype)}, not bfloat16"
    if size > 128 or size % 8:
        return f"the head size is {size}, not a multiple of 8 up to 128"
    if scoring.cap is not None:
        return f"attention scores are bounded by {scoring.cap:g}"
    if size != of_values:
        return f"keys have {size} dimensions, values {of_values}"
    return _no_sinks(scoring) or _no_dropout(dtype, sizes, rate, scoring)


_SPLASH_BLOCK = 512


def _splash(
    q: Array,
    k: Array,
    v: Array,
    mask: Mask,
    drop: Callable[[Array], Array],
    scoring: Scoring = Scoring(),  # noqa: B008 - frozen
    sinks: Array | None = None,
    *,
    interpret: bool = False,
) -> Array:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    del drop, sinks
    length, heads, d = q.shape[1:]
    seen = masks.FullMask((length, length))
    if mask.causal:
        shape = (length, length)
        seen = (
            masks.LocalMask(shape, (mask.window - 1, 0), 0)
            if mask.window
            else masks.CausalMask(shape)
        )
    block = next(size for size in (_SPLASH_BLOCK, 256, 128) if length % size == 0)
    fields = (field.name for field in dataclasses.fields(splash.BlockSizes))
    sizes: Any = {name: block for name in fields if name.startswith("block_")}
    attention = splash.make_splash_mha_single_device(
        masks.MultiHeadMask([seen] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        attn_logits_soft_cap=scoring.cap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    ids = mask.segments
    if mask.text is not None:
        # padding attends to padding, since every row must attend to something
        ids = jnp.where(mask.text, 1 if ids is None else ids + 1, 0)
    segments = (
        None if ids is None else splash.SegmentIds(ids.astype(jnp.int32), ids.astype(jnp.int32))
    )
    q = q * jnp.asarray(scoring.scale_of(d), q.dtype)
    q, k, v = (jnp.swapaxes(array, 1, 2) for array in (q, k, v))
    out: Any = jax.vmap(attention, in_axes=(0, 0, 0, None if segments is None else 0))(
        q, k, v, segments
    )
    return jnp.swapaxes(out, 1, 2).astype(v.dtype)


def _splash_lacks(dtype: Any, sizes: Sizes, rate: float, scoring: Scoring) -> str:
    odd = next((size for size in sizes if size % 64), None)
    if odd is not None:
        return f"the head size is {odd}, not a multiple of 64"
    return _no_sinks(scoring) or _no_dropout(dtype, sizes, rate, scoring)


def _splash_takes(q: Array, k: Array, mask: Mask) -> bool:
    return mask.dense is None and q.shape[1] == k.shape[1] and q.shape[1] % 128 == 0


def _no_dropout(dtype: Any, sizes: Sizes, rate: float, scoring: Scoring) -> str:
    return f"attention dropout is {rate}" if rate else ""


def _no_sinks(scoring: Scoring) -> str:
    return "heads have attention sinks" if scoring.sinks else ""


KERNELS: Mapping[str, AttentionKernel] = {
    "xla": AttentionKernel(_xla),
    "chunked": AttentionKernel(
        chunked_attention.compute, "", _no_dropout, lambda q, k, mask: mask.dense is None
    ),
    "cudnn": AttentionKernel(
        _cudnn,
        "cuda",
        _cudnn_lacks,
        lambda q, k, mask: mask.row_mask() is None or not (q.shape[1] % 2 or k.shape[1] % 2),
    ),
    "splash": AttentionKernel(_splash, "tpu", _splash_lacks, _splash_takes),
}
"""Every kernel by its name in configs."""


def platform(device: Any) -> str:
    """Return the platform of a device: `cpu`, `tpu`, `cuda` or `rocm`."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version else "cuda"


def fastest(platform: str) -> str:
    """Return the kernel to try first on a platform: `cuda`, `rocm`, `tpu` or `cpu`."""
    return next((name for name, kernel in KERNELS.items() if kernel.platform == platform), "xla")


def kernel_of(asked: str, platform: str, spread: int) -> str:
    """Return the attention kernel of a run: the requested one, or the fastest.

    Args:
        asked: a key of `KERNELS`, or `auto`.
        platform: platform of the devices.
        spread: number of devices over which positions are sharded.

    Raises:
        ConfigError: The requested kernel is not supported there.
    """
    if asked == "auto":
        return "chunked" if spread > 1 else fastest(platform)
    if KERNELS[asked].platform not in ("", platform):
        raise ConfigError(
            f"model.attention: {asked} runs on {KERNELS[asked].platform}, but the devices are"
            f" {platform}; set it to auto"
        )
    if spread > 1 and KERNELS[asked].platform:
        raise ConfigError(
            f"model.attention: {asked} needs unsharded rows, but mesh.sequence shards them over"
            f" {spread} devices; set it to auto"
        )
    return asked


def lacks(options: ModelOptions, config: Any) -> str:
    """Return why the attention kernel does not support a model; empty if it does.

    Args:
        options: options of the model.
        config: its architecture.
    """
    if options.attention != "xla" and getattr(config, "relative", False):
        return "scores have a term of relative positions"
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return KERNELS[options.attention].lacks(
        options.dtype,
        (size, getattr(config, "value_dim", size)),
        getattr(config, "attention_dropout", 0.0),
        getattr(config, "scoring", Scoring()),
    )
