"""Trainable tokens: only the embedding rows of a few tokens are trained.

    E' = E, but for the rows of the chosen tokens, which are trained

In an embedding they are rows; in a language-model head `W [d, vocab]` they are columns. A tied head
computes with the trained rows as well. Tokens that are new to a model are added by
`jaxpeft.load(..., vocab_size=N)` first.

Source: PEFT's documentation of `TrainableTokens`; there is no paper.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class TrainableTokensFormat(TargetedFormat["TrainableTokens"]):
    """The file format of `TrainableTokens` adapters."""

    def read_options(
        self, kind: type[TrainableTokens], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read PEFT's options; the initialization of the rows is irrelevant."""
        rest = {key: value for key, value in config.items() if key != "init_weights"}
        values, problems = super().read_options(
            kind, rest | {"target_modules": rest.get("target_modules") or "default"}
        )
        return values, problems


@dataclass(frozen=True, kw_only=True)
class TrainableTokens(Targeted):
    """Trains the rows of chosen tokens.

    Leaves of a site: `token_rows [n, d]` float32, trained, which begin as the base's;
    `token_ids [n]` int32.
    """

    name: ClassVar[str] = "trainable_tokens"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("token_rows", "token_ids"),
        trained=frozenset({"token_rows"}),
        zero_is_base=False,
    )
    sites: ClassVar[SiteSpec] = SiteSpec(
        kinds=("embedding", "linear"),
        hooks={"__call__": "compute", "attend": "compute_head"},
    )
    peft: ClassVar[PeftFormat[Any]] = TrainableTokensFormat(
        tensors={"token_rows": "trainable_tokens_delta"},
        untransposed=frozenset({"token_rows"}),
        type="TRAINABLE_TOKENS",
        options={"token_indices": "tokens", "target_modules": "targets"},
    )
    usual_targets: ClassVar[tuple[str, ...]] = ("embed_tokens", "word_embeddings", "tok_embeddings")

    tokens: tuple[int, ...] = option((), "ids of the tokens", at_least=0)
    targets: str | tuple[str, ...] = option(
        "default",
        "name suffixes of embeddings and heads; 'default' for the input embedding",
    )

    def problems(self) -> list[str]:
        """List problems with the tokens."""
        found = super().problems()
        if not self.tokens:
            found.append("tokens: is empty; list the ids of the tokens to train")
        if len(set(self.tokens)) < len(self.tokens):
            found.append("tokens: lists a token twice")
        return found

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize the rows to those of the base.

        Raises:
            ConfigError: A token is outside of the vocabulary.
        """
        del rng
        vocab = site.shape[0 if site.kind == "embedding" else 1]
        if max(self.tokens) >= vocab:
            raise ConfigError(
                f"trainable_tokens.tokens: {max(self.tokens)} is outside the {vocab} tokens of"
                f" {site.name}; load the model with vocab_size={max(self.tokens) + 1}"
            )
        ids = jnp.asarray(self.tokens, jnp.int32)
        rows = kernel() if site.kind == "embedding" else kernel().T
        return {"token_rows": rows[ids], "token_ids": ids}

    @staticmethod
    def compute(call: Call) -> Any:
        """Return the embeddings of token ids, or the logits of `x`, with the trained rows."""
        base = call.base(*call.args)
        if not jnp.issubdtype(call.x.dtype, jnp.integer):
            return _with_logits(call, base, call.kernel().T)

        def chosen(leaves: Leaves, ids: Any, plain: Any) -> Any:
            hit = ids[..., None] == leaves["token_ids"]
            rows = leaves["token_rows"].astype(plain.dtype)[jnp.argmax(hit, axis=-1)]
            return jnp.where(hit.any(axis=-1)[..., None], rows, plain)

        return call.each(chosen, call.x, base)

    @staticmethod
    def compute_head(call: Call) -> Any:
        """Return the logits of a head that is tied to the embedding."""
        return _with_logits(call, call.base(*call.args), call.kernel())

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return the kernel with the trained rows."""
        kernel, rows, ids = base["kernel"], leaves["token_rows"], leaves["token_ids"]
        if kernel.shape[-1] == rows.shape[-1] and "embedding" in base:
            return {"kernel": kernel.at[ids].set(rows)}
        return (
            {"kernel": kernel.at[:, ids].add(rows.T - base["original"][:, ids])}
            if "original" in base
            else {"kernel": kernel.at[:, ids].set(rows.T)}
        )


def _with_logits(call: Call, logits: Any, rows: Any) -> Any:
    """Add the effect of the trained rows to the base's logits `[..., vocab]`."""

    def add_trained(leaves: Leaves, x: Any, plain: Any) -> Any:
        ids = leaves["token_ids"]
        change = x.astype(jnp.float32) @ (leaves["token_rows"] - rows[ids]).T
        return plain.at[..., ids].add(change.astype(plain.dtype))

    return call.each(add_trained, call.x, logits)
