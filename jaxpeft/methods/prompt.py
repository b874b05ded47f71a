"""Prompt tuning: trained embeddings before those of a row's tokens.

    model([P; E(x)]),    P: [n, hidden]

The `n` virtual tokens run through all layers as others do, at the first positions. They start as
rows of the word embedding, drawn at random or those of given tokens or of a text, or at random.

Lester et al. 2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", sections 2 and 3.2
(arXiv:2104.08691).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.virtual_tokens import (
    VirtualTokens,
    call_with_virtual,
    each_row,
    prompt_width,
    repeat_tokens,
    rows_of,
    word_embedding,
)

_ROOT_LEAVES = ("prompt_embeddings",)


@dataclass(frozen=True, kw_only=True)
class PromptTuning(VirtualTokens):
    """Trained embeddings before those of a row's tokens.

    Leaf at the root: `prompt_embeddings [n, hidden]`, trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "prompt"
    paper: ClassVar[str] = "arXiv:2104.08691"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        root=_ROOT_LEAVES,
        trained=frozenset(_ROOT_LEAVES),
    )
    peft: ClassVar[PeftFormat[Any]] = dataclasses.replace(
        VirtualTokens.peft,
        type="PROMPT_TUNING",
        ignored=VirtualTokens.peft.ignored
        | {
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "tokenizer_name_or_path",
            "tokenizer_kwargs",
        },
    )

    init_weights: Literal["vocabulary", "normal"] = option(
        "vocabulary", "initialize with random rows of the word embedding, or with N(0, 1)"
    )
    init_tokens: tuple[int, ...] = option(
        (), "initialize with the embeddings of these tokens, repeated or truncated", at_least=0
    )
    init_text: str = option(
        "", "initialize with the embeddings of this text, repeated or truncated; only in training"
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        names = [name for name in ("init_tokens", "init_text") if getattr(self, name)]
        names += ["init_weights"] if self.init_weights == "normal" else []
        return (
            [f"{names[0]}: cannot be used with {names[1]}; remove one of them"]
            if len(names) > 1
            else []
        )

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Initialize the table; `init_text` is applied later, in `start`."""
        del sites
        hidden, vocab = prompt_width(params), word_embedding(params).shape[0]
        if self.init_weights == "normal":
            return {
                "prompt_embeddings": jax.random.normal(
                    rng, (self.num_virtual_tokens, hidden), jnp.float32
                )
            }
        drawn = jax.random.randint(rng, (self.num_virtual_tokens,), 0, vocab)
        ids = (
            repeat_tokens(self.init_tokens, self.num_virtual_tokens, vocab)
            if self.init_tokens
            else drawn
        )
        return {"prompt_embeddings": rows_of(params, ids)}

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Initialize the table to the embeddings of `init_text`, with special tokens, if given."""
        if not self.init_text:
            return self, params
        tokens = run.tokenizer(self.init_text)["input_ids"] if run.tokenizer is not None else []
        if not tokens:
            why = (
                "the model has no tokenizer"
                if run.tokenizer is None
                else f"{self.init_text!r} has no tokens"
            )
            raise ConfigError(f"init_text: {why}; use init_tokens")
        ids = repeat_tokens(tokens, self.num_virtual_tokens, word_embedding(params).shape[0])
        return self, {**params, "prompt_embeddings": rows_of(run.base, ids)}

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return the embeddings, float32 `[n, hidden]`."""
        return leaves["prompt_embeddings"]

    @staticmethod
    def compute(call: Call) -> Any:
        """Call the model with the table as its prompt."""
        return call_with_virtual(call, prompt=each_row(call, PromptTuning.table))
