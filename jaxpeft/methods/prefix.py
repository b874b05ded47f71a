"""Prefix tuning: trained keys and values before each layer's own.

    h = softmax(q [P_k; K]^T / sqrt(d)) [P_v; V],    P: [n, layers, 2, w]

`n` virtual tokens, `w` the width of the keys (key heads times head size, with grouped queries those
of the key heads). Keys are taken as they are, after the rotation; the row's tokens stand behind
them, at the positions from `n` on. With `projection` the table comes from a small network, and that
is trained:

    P = tanh(E W1 + b1) W2 + b2,    E: [n, w], W1: [w, e], W2: [e, layers, 2, w]

`init_tokens` starts the table at the keys and values that the base computes for these tokens: a
fresh prefix of a decoder is then the same as the tokens themselves, in front of the row.

Li and Liang 2021, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", sections 4.2 and
4.3, and 7.4 for starts from real words (arXiv:2101.00190).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.virtual_tokens import (
    VirtualTokens,
    VirtualTokensFormat,
    call_with_virtual,
    each_row,
    layers_and_width,
    linear,
    repeat_tokens,
    word_embedding,
)

_ROOT_LEAVES = (
    "prefix_embeddings",
    "prefix_w1",
    "prefix_b1",
    "prefix_w2",
    "prefix_b2",
    "prefix_dropout",
)


M = TypeVar("M", bound=VirtualTokens)


@dataclass(frozen=True)
class PrefixSizesFormat(VirtualTokensFormat[M]):
    """The file format of adapters that are keys and values."""

    def base_sizes(self, method: M, params: Leaves, config: Any) -> dict[str, Any]:
        """Return the sizes of the base, with the number of key heads."""
        width, size = layers_and_width(params)[1], getattr(config, "widest_head", None)
        heads = config.num_attention_heads if size is None else width // size
        sizes = {"token_dim": width, "num_attention_heads": heads}
        return super().base_sizes(method, params, config) | sizes


@dataclass(frozen=True, kw_only=True)
class PrefixTuning(VirtualTokens):
    """Trained keys and values before each layer's own.

    Leaves at the root: `prefix_embeddings [n, layers, 2, w]`, with `projection` `[n, w]` and the
    network's `prefix_w1`, `prefix_b1`, `prefix_w2`, `prefix_b2`, all trained; `prefix_dropout []`
    if the rate is not zero.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "prefix"
    paper: ClassVar[str] = "arXiv:2101.00190"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        root=_ROOT_LEAVES,
        trained=frozenset(_ROOT_LEAVES) - {"prefix_dropout"},
    )
    peft: ClassVar[PeftFormat[Any]] = VirtualTokens.peft.replace(
        PrefixSizesFormat,
        type="PREFIX_TUNING",
        ignored=VirtualTokens.peft.ignored | {"prefix_projection", "init_weights"},
    )

    projection: bool = option(
        False, "train a network that produces the table, instead of the table"
    )
    encoder_hidden_size: int | None = option(
        None, "width of that network; None for that of the keys", at_least=1
    )
    dropout: float = option(
        0.0, "rate of dropout on keys and values of the prefix", at_least=0, below=1
    )
    init_weights: Literal["normal", "zero"] = option(
        "normal", "initialize with N(0, 1), or with keys and values of zero"
    )
    init_tokens: tuple[int, ...] = option(
        (), "initialize with the keys and values of these tokens, repeated or truncated", at_least=0
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        found: list[str] = []
        if self.init_tokens and self.projection:
            found.append(
                "init_tokens: cannot be used with projection, since the network has no known input"
                " for their keys"
            )
        if self.init_tokens and self.init_weights == "zero":
            found.append("init_tokens: cannot be used with init_weights 'zero'; remove one of them")
        return found

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Initialize the table, or the network that produces it."""
        del sites
        layers, width = layers_and_width(params)
        keys, zero = jax.random.split(rng, 3), self.init_weights == "zero"
        hidden = self.encoder_hidden_size or width
        shape = (self.num_virtual_tokens, *((width,) if self.projection else (layers, 2, width)))
        leaves = {"prefix_embeddings": jax.random.normal(keys[0], shape, jnp.float32)}
        if self.projection:
            leaves["prefix_w1"], leaves["prefix_b1"] = linear(keys[1], width, hidden)
            leaves["prefix_w2"], leaves["prefix_b2"] = linear(keys[2], hidden, layers, 2, width)
        for key in ("prefix_w2", "prefix_b2") if self.projection else ("prefix_embeddings",):
            leaves[key] = jnp.zeros_like(leaves[key]) if zero else leaves[key]
        return leaves | (
            {"prefix_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Initialize the table to the keys and values of `init_tokens`, if given."""
        if not self.init_tokens:
            return self, params
        ids = repeat_tokens(
            self.init_tokens, self.num_virtual_tokens, word_embedding(params).shape[0]
        )
        layers = params["prefix_embeddings"].shape[1]
        return self, {**params, "prefix_embeddings": keys_and_values(run, ids, layers)}

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return keys and values, float32 `[n, layers, 2, w]`."""
        table = leaves["prefix_embeddings"]
        if "prefix_w1" not in leaves:
            return table
        hidden = jnp.tanh(
            jnp.matmul(table, leaves["prefix_w1"], precision="highest") + leaves["prefix_b1"]
        )
        return (
            jnp.tensordot(hidden, leaves["prefix_w2"], 1, precision="highest") + leaves["prefix_b2"]
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Call the model with the table as its past."""
        past = each_row(call, PrefixTuning.table)
        if "prefix_dropout" in call.leaves and call.dropout_key is not None:
            past = jnp.broadcast_to(past, (len(call.x), *past.shape[1:]))  # each row drops its own
        return call_with_virtual(call, past=drop_input(call, past, "prefix_dropout"))


@dataclass(frozen=True, kw_only=True)
class PTuningV2(PrefixTuning):
    """Deep prompts: prefix tuning for classification and generation, with different defaults.

    Every layer has its own directly trained prompt, next to a plain classification head; dropout
    acts on the prompts. Files have the format of prefix tuning, and are loaded as such.

    Liu et al. 2021, "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across
    Scales and Tasks", section 3 (arXiv:2110.07602); the defaults of network and dropout are those
    of its code.
    """

    name: ClassVar[str] = "ptuning_v2"
    paper: ClassVar[str] = "arXiv:2110.07602"

    encoder_hidden_size: int | None = option(
        512, "width of that network; None for that of the keys", at_least=1
    )
    dropout: float = option(
        0.1, "rate of dropout on keys and values of the prefix", at_least=0, below=1
    )


def keys_and_values(run: Any, ids: Any, layers: int) -> jax.Array:
    """Compute the keys, rotated, and values of each layer for a row of tokens: float32
    `[n, layers, 2, w]`.

    Raises:
        ConfigError: Layers have keys of different sizes, or none.
    """
    from jaxpeft.models.base import PAST
    from jaxpeft.models.kv_cache import KEYS, VALUES, in_order, read_layers

    _, kept = jax.jit(lambda base, ids: run.apply(base, ids, mutable=[PAST]))(run.base, ids[None])
    found = read_layers(kept[PAST])
    shapes = {leaf.shape[-4:] for own in found.values() for leaf in own.values()}
    kinds = (KEYS, VALUES) if len(shapes) == 1 else ()
    both = [in_order({name: own[kind] for name, own in found.items()}) for kind in kinds]
    if not both or len(both[0]) < layers:
        raise ConfigError(
            "init_tokens: layers have keys of different sizes, or share them; leave it empty"
        )
    past = jnp.stack(both, axis=1)[:, :, 0]  # [layers, 2, kv_heads, n, d]
    past = jnp.transpose(past, (3, 0, 1, 2, 4)).astype(jnp.float32)
    return past.reshape(*past.shape[:3], -1)
