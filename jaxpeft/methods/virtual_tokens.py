"""The base class of methods that prepend virtual tokens to each row; they adapt the model, not
sites.

Their leaves are at the root of the tree. The model is called with
`virtual=Virtual(past=..., prompt=...)`, which the models of `jaxpeft.load` support
(`jaxpeft.models.masks.Virtual`). Sizes are derived from the base's tree: the number and width of
the key projections, and the word embedding.

In files, each method is one table, `prompt_embeddings [virtual tokens, width]`. A network that
produces it is saved in checkpoints, but not in files, as in Hugging Face PEFT.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.core.targets import Site, find_sites
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp

TABLE = "prompt_embeddings"
_KEYS, _WORDS = (
    ("k_proj", "key", "k_lin"),
    ("embed_tokens", "word_embeddings", "tok_embeddings", "wte"),
)
_JOINT = {"qkv_proj": "o_proj"}
"""Projections to queries, keys and values together, with the projection after attention."""


M = TypeVar("M", bound="VirtualTokens")


@dataclass(frozen=True)
class VirtualTokensFormat(PeftFormat[M]):
    """The file format of `VirtualTokens` adapters."""

    def pack_root(self, method: M, leaves: Leaves) -> dict[str, Any]:
        """Return the table as one matrix."""
        table = method.table(leaves)
        return {TABLE: table.reshape(len(table), -1)}

    def unpack_root(self, method: M, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the leaves of a method whose leaf is the table."""
        marker = method.leaves.root[0]
        return {**fresh, marker: tensors[TABLE].reshape(fresh[marker].shape)}

    def base_sizes(self, method: M, params: Leaves, config: Any) -> dict[str, Any]:
        """Return the sizes of the base that PEFT requires."""
        width = word_embedding(params).shape[1]
        sizes = {"token_dim": width, "num_layers": config.num_hidden_layers}
        return {
            **sizes,
            "num_attention_heads": config.num_attention_heads,
            "num_transformer_submodules": 1,
        }

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; PEFT's 2 submodules are those of an encoder and a decoder."""
        one = config.get("num_transformer_submodules") == 1
        known = {k: v for k, v in config.items() if not (one and k == "num_transformer_submodules")}
        values, problems = super().read_options(kind, known)
        if config.get("task_type") is None:
            problems.append(
                "task_type: is not set, so PEFT would ignore the virtual tokens; set it to the task"
                " of the adapter, such as CAUSAL_LM"
            )
        return values, problems


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Method):
    """A method that prepends virtual tokens to each row, or to each text of a packed row.

    A fresh adapter changes the outputs, since every token attends to the virtual ones.
    """

    sites: ClassVar[SiteSpec] = SiteSpec(
        inputs=("virtual",),
    )
    peft: ClassVar[PeftFormat[Any]] = VirtualTokensFormat(
        # PEFT does not wrap the base's modules
        module_prefix="base_model.",
        options={"num_virtual_tokens": "num_virtual_tokens"},
        required=("num_virtual_tokens",),
        # sizes of the base, which follow from the table, and of networks that files omit
        ignored=frozenset(
            {"task_type", "token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size"}
        ),
    )

    num_virtual_tokens: int = option(20, "number of virtual tokens before each row", at_least=1)

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return False

    @property
    def virtual_positions(self) -> int:
        """The number of positions before a row's tokens."""
        return self.num_virtual_tokens

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return the table, float32 `[virtual tokens, ...]`, from the leaves."""
        raise NotImplementedError


def call_with_virtual(call: Call, *, past: Any = None, prompt: Any = None) -> Any:
    """Call the model with virtual positions, after those of another method if any.

    Args:
        call: call of the model.
        past: `[batch or 1, n, layers, 2, kv_heads * d]`: keys, rotated, and values; or None.
        prompt: `[batch or 1, n, hidden]`; or None.
    """
    from jaxpeft.models.masks import Virtual

    kwargs = dict(call.kwargs)
    virtual = kwargs.pop("virtual", Virtual())
    if past is not None:
        virtual = dataclasses.replace(
            virtual, past=_concatenate(virtual.past, jnp.transpose(past, (2, 3, 0, 1, 4)), 2)
        )
    if prompt is not None:
        virtual = dataclasses.replace(virtual, prompt=_concatenate(virtual.prompt, prompt, 0))
    return call.base(*call.args, **kwargs, virtual=virtual)


def _concatenate(a: Any, b: Any, batch: int) -> Any:
    """Concatenate two arrays along the second-last axis, broadcasting a batch axis of size 1."""
    if a is None:
        return b
    rows = max(a.shape[batch], b.shape[batch])
    a, b = (jnp.broadcast_to(x, (*x.shape[:batch], rows, *x.shape[batch + 1 :])) for x in (a, b))
    return jnp.concatenate([a, b], axis=-2)


def each_row(call: Call, table: Any) -> Any:
    """Compute the table for each row, or for all rows: `[batch or 1, virtual tokens, ...]`.

    Args:
        call: call of the model.
        table: function from leaves to `[virtual tokens, ...]`.
    """
    tables = call.each(table)
    return tables[None] if call.rows is None else tables


# ----------------------------------------------------------------------------------------- the base


def layers_and_width(params: Leaves) -> tuple[int, int]:
    """Return the number of attention layers and the width of their keys.

    Raises:
        ConfigError: There are no key projections, they differ in width, or a layer has none.
    """
    sites = {site.path: site for site in find_sites(params)}
    keys = [(site, site.shape[1]) for path, site in sites.items() if path[-1] in _KEYS]
    for path, site in sites.items():
        output = sites.get((*path[:-1], _JOINT.get(path[-1], "")))
        if output is not None:  # the queries are as wide as what follows attention
            keys.append((site, (site.shape[1] - output.shape[0]) // 2))
    widths = sorted({width for _, width in keys})
    if len(widths) != 1:
        found = (
            f"are {' and '.join(map(str, widths))} wide"
            if keys
            else f"({', '.join((*_KEYS, *_JOINT))}) are not in the tree"
        )
        raise ConfigError(f"the key projections {found}; virtual tokens need keys of one width")
    count, layers = (
        len({_layer_of(name) for site in some for name in site.names} - {None})
        for some in ([site for site, _ in keys], sites.values())
    )
    if count < layers:
        raise ConfigError(
            f"{layers - count} of the {layers} layers have a recurrence instead of attention, so"
            " they have no keys, which these virtual tokens need in every layer; use prompt tuning"
            " or another method"
        )
    return sum(len(site.names) for site, _ in keys), widths[0]


def _layer_of(name: str) -> str | None:
    """Return the number of the layer in a module's name; None if it is in no layer."""
    parts = tuple(name.split("."))
    at = paths.layers_at(parts)
    return None if at is None else parts[at + 1]


def word_embedding(params: Leaves) -> Site:
    """Return the embedding of the vocabulary.

    Raises:
        ConfigError: It does not exist.
    """
    found = next(
        (site for site in find_sites(params, ("embedding",)) if site.path[-1] in _WORDS), None
    )
    if found is None:
        raise ConfigError(
            f"the word embedding ({', '.join(_WORDS)}) is not in the tree; virtual tokens need it"
        )
    return found


def rows_of(params: Leaves, ids: Any) -> Any:
    """Return rows of the word embedding, float32 `[n, hidden]`.

    Args:
        params: the base.
        ids: `[n]`, in the vocabulary.
    """
    site = word_embedding(params)
    # compiled together, to avoid a second copy of the embedding
    return jax.jit(lambda leaves, ids: kernels.read(leaves, site.shape)[ids])(
        paths.get(params, site.path), ids
    )


def repeat_tokens(tokens: Sequence[int], count: int, vocab: int) -> Any:
    """Repeat or truncate token ids to `count`, `[count]` int32.

    Args:
        tokens: at least one token id.
        count: length of the result.
        vocab: size of the vocabulary.

    Raises:
        ConfigError: A token is not in the vocabulary.
    """
    if max(tokens) >= vocab:
        raise ConfigError(f"init_tokens: {max(tokens)} is outside the vocabulary of {vocab}")
    return jnp.asarray([tokens[i % len(tokens)] for i in range(count)], jnp.int32)


def linear(rng: jax.Array, n_in: int, *n_out: int) -> tuple[jax.Array, jax.Array]:
    """Return a weight `[in, *out]` and a bias `[*out]`, initialized as in torch."""
    keys, bound = jax.random.split(rng), n_in**-0.5
    weight = jax.random.uniform(keys[0], (n_in, *n_out), jnp.float32, -bound, bound)
    return weight, jax.random.uniform(keys[1], n_out, jnp.float32, -bound, bound)
