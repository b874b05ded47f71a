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
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from jaxpeft import kernels
from jaxpeft.core import paths
from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
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
_QUERIES = ("q_proj", "query", "q_lin")
_JOINT = {"qkv_proj": "o_proj"}
"""Projections to queries, keys and values together, with the projection after attention."""
_EXPANSION = "kv_b_proj"
"""The projection of a latent to the keys and values of all heads."""


_LAYER_WORDS = "embed_tokens_per_layer"
"""The module that embeds tokens for each layer."""


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
    """Return the number of layers, and the width of the keys of the widest heads.

    Keys may differ in the number and the size of their heads, if a norm of keys tells the size: a
    layer then takes the first heads, and of these the first dimensions, of a prefix for the widest
    heads. A layer that attends to the keys of another leaves its part unused. Both are as in PEFT.

    Raises:
        ConfigError: There are no key projections, no width fits all, or a layer has none.
    """
    sites = {site.path: site for site in find_sites(params, ("linear", "norm"))}
    if any(path[-1] == _EXPANSION for path in sites):
        raise ConfigError(
            "virtual tokens with keys and values: latent attention computes keys and values, which"
            f" may have different sizes, from one vector ({_EXPANSION}); PEFT's files have keys and"
            " values of one size, and it cannot add them to such a model; use prompt or ptuning"
        )
    keys = [site for path, site in sites.items() if path[-1] in _KEYS]
    queries = [site for path, site in sites.items() if path[-1] in _QUERIES]
    widths = {site.shape[1] for site in keys}
    for path, site in sites.items():
        output = sites.get((*path[:-1], _JOINT.get(path[-1], "")))
        if output is not None:  # the queries are as wide as what follows attention
            queries.append(site)
            widths.add((site.shape[1] - output.shape[0]) // 2)
    if not widths:
        named = ", ".join((*_KEYS, *_JOINT))
        raise ConfigError(
            f"the key projections ({named}) are not in the tree; virtual tokens need"
            " keys of one width"
        )
    adapted, every = (
        len({_layer_of(name) for site in some for name in site.names} - {None})
        for some in ((*keys, *queries), sites.values())
    )
    if adapted < every:
        raise ConfigError(
            f"{every - adapted} of the {every} layers have a recurrence instead of attention, so"
            " they have no keys, which these virtual tokens need in every layer; use prompt tuning"
            " or another method"
        )
    layers = max(sum(len(site.names) for site in each) for each in (keys, queries))
    return layers, _widest(widths, [_shape_of_heads(sites, site) for site in keys])


def _shape_of_heads(sites: Mapping[Path, Site], keys: Site) -> tuple[int, int] | None:
    """Return the number and size of key heads, from the norm of keys; None without one."""
    norm = sites.get((*keys.path[:-1], "k_norm"))
    return None if norm is None else (keys.shape[1] // norm.shape[1], norm.shape[1])


def _widest(widths: Collection[int], shapes: Sequence[tuple[int, int] | None]) -> int:
    """Return the width of the widest heads.

    Raises:
        ConfigError: Widths differ and heads are unknown, or layers have more heads than the one
            with the widest.
    """
    known = [shape for shape in shapes if shape is not None]
    if len(widths) > 1 and len(known) < len(shapes):
        found = " and ".join(map(str, sorted(widths)))
        raise ConfigError(
            f"the key projections are {found} wide; virtual tokens need keys of one width"
        )
    if not known:
        return max(widths)
    heads, size = max(known, key=lambda shape: shape[1])
    if more := [shape for shape in known if shape[0] > heads]:
        raise ConfigError(
            f"layers have {more[0][0]} key heads of size {more[0][1]} and {heads} of size {size};"
            " virtual tokens need layers with no more heads than the one with the widest (PEFT"
            " leaves the others without a prefix)"
        )
    return heads * size


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


def prompt_width(params: Leaves) -> int:
    """Return the width of a prompt, that of the word embedding.

    Raises:
        ConfigError: The layers also embed tokens, of which virtual ones have none.
    """
    table = next((path for path, _ in paths.walk(params) if _LAYER_WORDS in path), None)
    if table is not None:
        raise ConfigError(
            f"every layer embeds the tokens ({paths.text(table[:-1])}), but virtual tokens have no"
            " number in its table; use prefix tuning, or a method that adapts modules"
        )
    return word_embedding(params).shape[1]


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
