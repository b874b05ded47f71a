"""What the methods have in common that put virtual tokens in front of a row: they adapt no site,
but the whole model.

Their leaves stand at the root of the tree. The model is called with `virtual=Virtual(past=...,
prompt=...)`, which the models of `jaxpeft.load` know how to put in front
(`jaxpeft.models.masks.Virtual`). Sizes come from the base's tree alone: numbers and widths of the
key projections, and the word embedding.

In files each of them is one table, `prompt_embeddings [virtual tokens, width]`: a network that
makes it is trained, and kept in checkpoints, but left out of files, as in Hugging Face PEFT.
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
_KEYS, _WORDS = ("k_proj", "key", "k_lin"), ("embed_tokens", "word_embeddings", "wte")


M = TypeVar("M", bound="VirtualTokens")


@dataclass(frozen=True)
class VirtualTokensFormat(PeftFormat[M]):
    """How adapters of `VirtualTokens` stand in files."""

    def pack_root(self, method: M, leaves: Leaves) -> dict[str, Any]:
        """Return the table as one matrix."""
        table = method.table(leaves)
        return {TABLE: table.reshape(len(table), -1)}

    def unpack_root(self, method: M, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the leaves of a method that keeps the table itself."""
        marker = method.leaves.root[0]
        return {**fresh, marker: tensors[TABLE].reshape(fresh[marker].shape)}

    def base_sizes(self, method: M, params: Leaves, config: Any) -> dict[str, Any]:
        """Return the sizes of the base, as PEFT asks for them."""
        width = word_embedding(params).shape[1]
        sizes = {"token_dim": width, "num_layers": layers_and_width(params)[0]}
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
                "task_type: is not set, and PEFT then computes the base alone, without the virtual"
                " tokens; set it to what the adapter was trained for, such as CAUSAL_LM"
            )
        return values, problems


@dataclass(frozen=True, kw_only=True)
class VirtualTokens(Method):
    """A method that puts virtual tokens in front of each row; in a packed row, in front of each
    text.

    A fresh one changes the outputs: every token attends to the virtual ones, whatever they hold.
    """

    sites: ClassVar[SiteSpec] = SiteSpec(
        inputs=("virtual",),
    )
    peft: ClassVar[PeftFormat[Any]] = VirtualTokensFormat(
        # PEFT keeps the base as it is beside the table
        module_prefix="base_model.",
        options={"num_virtual_tokens": "num_virtual_tokens"},
        required=("num_virtual_tokens",),
        # sizes of the base, which the shape of the table tells as well, and of networks that files
        # leave out
        ignored=frozenset(
            {"task_type", "token_dim", "num_layers", "num_attention_heads", "encoder_hidden_size"}
        ),
    )

    num_virtual_tokens: int = option(
        20, "how many virtual tokens stand in front of a row", at_least=1
    )

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output as it was, bit by bit."""
        return False

    @property
    def virtual_positions(self) -> int:
        """How many positions it takes in front of a row's tokens."""
        return self.num_virtual_tokens

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return the table, float32 `[virtual tokens, ...]`, from the leaves."""
        raise NotImplementedError


def call_with_virtual(call: Call, *, past: Any = None, prompt: Any = None) -> Any:
    """Call the model with virtual positions in front, behind those of another method if there are
    any.

    Args:
        call: of the model.
        past: `[batch or 1, n, layers, 2, kv_heads * d]`: keys, rotated, and values; or None.
        prompt: `[batch or 1, n, hidden]`; or None.
    """
    from jaxpeft.models.masks import Virtual

    given = dict(call.kwargs)
    virtual = given.pop("virtual", Virtual())
    if past is not None:
        virtual = dataclasses.replace(
            virtual, past=_concatenate(virtual.past, jnp.transpose(past, (2, 3, 0, 1, 4)), 2)
        )
    if prompt is not None:
        virtual = dataclasses.replace(virtual, prompt=_concatenate(virtual.prompt, prompt, 0))
    return call.base(*call.args, **given, virtual=virtual)


def _concatenate(a: Any, b: Any, batch: int) -> Any:
    """Put two arrays one behind the other along their axis before the last; either may have one row
    for all.
    """
    if a is None:
        return b
    rows = max(a.shape[batch], b.shape[batch])
    a, b = (jnp.broadcast_to(x, (*x.shape[:batch], rows, *x.shape[batch + 1 :])) for x in (a, b))
    return jnp.concatenate([a, b], axis=-2)


def each_row(call: Call, table: Any) -> Any:
    """Compute the table of each row, or of all: `[batch or 1, virtual tokens, ...]`.

    Args:
        call: of the model.
        table: from leaves to `[virtual tokens, ...]`.
    """
    made = call.each(table)
    return made[None] if call.rows is None else made


# ----------------------------------------------------------------------------------------- the base


def layers_and_width(params: Leaves) -> tuple[int, int]:
    """Return the number of attention layers and the width of their keys, as the key projections
    say.

    Raises:
        ConfigError: there is none, or they differ in width.
    """
    sites = [site for site in find_sites(params) if site.path[-1] in _KEYS]
    widths = sorted({site.shape[1] for site in sites})
    if len(widths) != 1:
        found = (
            f"are {' and '.join(map(str, widths))} wide"
            if sites
            else f"({', '.join(_KEYS)}) are not in the tree"
        )
        raise ConfigError(
            f"the key projections {found}; keys can be put in front of those of one width"
        )
    return sum(len(site.names) for site in sites), widths[0]


def word_embedding(params: Leaves) -> Site:
    """Return the embedding of the vocabulary.

    Raises:
        ConfigError: there is none.
    """
    found = next(
        (site for site in find_sites(params, ("embedding",)) if site.path[-1] in _WORDS), None
    )
    if found is None:
        raise ConfigError(
            f"the word embedding ({', '.join(_WORDS)}) is not in the tree; no token can stand"
            " beside its rows"
        )
    return found


def rows_of(params: Leaves, ids: Any) -> Any:
    """Return rows of the word embedding, float32 `[n, hidden]`.

    Args:
        params: the base.
        ids: `[n]`, in the vocabulary.
    """
    site = word_embedding(params)
    # compiled as one: no second copy of the whole embedding is made
    return jax.jit(lambda leaves, ids: kernels.read(leaves, site.shape)[ids])(
        paths.get(params, site.path), ids
    )


def repeat_tokens(tokens: Sequence[int], count: int, vocab: int) -> Any:
    """Return `count` token ids, `[count]` int32: those given, over and over, the last time in part.

    Args:
        tokens: at least one.
        count: how many.
        vocab: size of the vocabulary.

    Raises:
        ConfigError: a token is not in the vocabulary.
    """
    if max(tokens) >= vocab:
        raise ConfigError(f"init_tokens: {max(tokens)} is outside the vocabulary of {vocab}")
    return jnp.asarray([tokens[i % len(tokens)] for i in range(count)], jnp.int32)


def linear(rng: jax.Array, n_in: int, *n_out: int) -> tuple[jax.Array, jax.Array]:
    """Make a weight `[in, *out]` and a bias `[*out]`, uniform within 1 / sqrt(in), as torch begins
    a linear layer.
    """
    keys, bound = jax.random.split(rng), n_in**-0.5
    weight = jax.random.uniform(keys[0], (n_in, *n_out), jnp.float32, -bound, bound)
    return weight, jax.random.uniform(keys[1], n_out, jnp.float32, -bound, bound)
