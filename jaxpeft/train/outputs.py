"""Model outputs for a batch, computed lazily."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax

from jaxpeft.forward import run
from jaxpeft.models.base import ROUTING
from jaxpeft.models.experts import balance_loss

Batch = Mapping[str, jax.Array]
_INPUTS = ("token_type_ids", "position_ids", "segment_ids")


@dataclass(frozen=True)
class Outputs:
    """Model outputs for a batch, each computed once, on first access.

    Attributes:
        model: Linen module.
        params: complete parameter tree.
        batch: `input_ids` and `attention_mask` `[rows, length]`, and optional inputs.
        key: dropout key of a training call; None for no dropout.
        sown: what the modules have sown in the call.
    """

    model: nn.Module
    params: Mapping[str, Any]
    batch: Batch
    key: jax.Array | None
    sown: dict[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def logits(self) -> jax.Array:
        """The logits."""
        return self._run({})

    @cached_property
    def hidden(self) -> jax.Array:
        """Final hidden states, the input of a language model's head, `[rows, length, d]`."""
        return self._run({"hidden": True})

    def head(self, x: jax.Array, chunk: jax.Array) -> jax.Array:
        """Return the logits of hidden states; `chunk`, an int32 scalar, is folded into the dropout
        key.
        """
        rngs = None if self.key is None else {"dropout": jax.random.fold_in(self.key, chunk)}
        return run(self.model, self.params, x, rngs=rngs, method="head")

    @property
    def added_loss(self) -> jax.Array | None:
        """The loss that the model adds to that of a batch, after a call; None for no loss.

        It is the load-balancing loss of experts, with its weight in the model's config.
        """
        if ROUTING not in self.sown:
            return None
        return self.model.config.mixture.balance * balance_loss(self.sown[ROUTING])

    def _run(self, options: Mapping[str, Any]) -> jax.Array:
        batch, extra = (
            self.batch,
            {name: self.batch[name] for name in _INPUTS if name in self.batch},
        )
        rngs = None if self.key is None else {"dropout": self.key}
        call = partial(
            run,
            self.model,
            self.params,
            batch["input_ids"],
            batch["attention_mask"],
            rngs=rngs,
            **extra,
            **options,
        )
        mixture = getattr(self.model.config, "mixture", None)
        if mixture is None or not mixture.balance:
            return call()
        out, sown = call(mutable=[ROUTING])
        self.sown.update(sown)
        return out
