r"""Cartridges: a trained cache of keys and values, whose first positions may be frozen.

    h = softmax(q [Z_k; K]^T / sqrt(d)) [Z_v; V],    Z = [Z_0; Z_1]: [n, layers, 2, w]

Computed as prefix tuning: `n` virtual tokens, `w` the width of the keys, which are taken as they
are, after the rotation. `Z_0`, the first `frozen_tokens` positions, is not trained: many models
attend strongly to the first tokens of a text, and changing these harms training. With
`init_tokens`, the usual start, `Z` begins with the keys and values that the base computes for these
tokens, such as the beginning of a corpus. What it is trained on, the paper's self-study, is up to
the data.

Eyuboglu et al. 2025, "Cartridges: Lightweight and general-purpose long context representations via
self-study" (arXiv:2506.06266).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.prefix import PrefixSizesFormat, keys_and_values
from jaxpeft.methods.virtual_tokens import (
    TABLE,
    VirtualTokens,
    call_with_virtual,
    each_row,
    layers_and_width,
    repeat_tokens,
    word_embedding,
)


@dataclass(frozen=True)
class CartridgeFormat(PrefixSizesFormat["Cartridge"]):
    """The file format of `Cartridge` adapters."""

    def unpack_root(self, method: Cartridge, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the frozen and the trained positions of the table."""
        whole = method.table(fresh).shape
        return {**fresh, **_split(tensors[TABLE].reshape(whole), method.frozen_tokens)}


@dataclass(frozen=True, kw_only=True)
class Cartridge(VirtualTokens):
    """Trained keys and values before each layer's own, behind frozen ones.

    Leaves at the root: `cartridge_trained [n - f, layers, 2, w]`, trained, and
    `cartridge_frozen [f, layers, 2, w]` if `f` is not zero, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "cartridge"
    paper: ClassVar[str] = "arXiv:2506.06266"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        root=("cartridge_trained", "cartridge_frozen"),
        trained=frozenset({"cartridge_trained"}),
    )
    peft: ClassVar[PeftFormat[Any]] = VirtualTokens.peft.replace(
        CartridgeFormat,
        type="CARTRIDGE",
        options={**VirtualTokens.peft.options, "num_frozen_tokens": "frozen_tokens"},
    )

    frozen_tokens: int = option(
        1, "number f of virtual tokens, the first ones, that are not trained", at_least=0
    )
    init_tokens: tuple[int, ...] = option(
        (), "initialize with the keys and values of these tokens, repeated or truncated", at_least=0
    )

    def problems(self) -> list[str]:
        """List incompatible options: a virtual token must be trained."""
        all_frozen = self.frozen_tokens >= self.num_virtual_tokens
        why = f"frozen_tokens: {self.frozen_tokens} is not less than num_virtual_tokens,"
        return [f"{why} {self.num_virtual_tokens}"] if all_frozen else []

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Draw the table from N(0, 1)."""
        del sites
        shape = (self.num_virtual_tokens, *_sizes(params))
        return _split(jax.random.normal(rng, shape, jnp.float32), self.frozen_tokens)

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Initialize the table to the keys and values of `init_tokens`, if given."""
        if not self.init_tokens:
            return self, params
        vocab = word_embedding(params).shape[0]
        ids = repeat_tokens(self.init_tokens, self.num_virtual_tokens, vocab)
        layers = params["cartridge_trained"].shape[1]
        return self, {**params, **_split(keys_and_values(run, ids, layers), self.frozen_tokens)}

    @staticmethod
    def table(leaves: Leaves) -> Any:
        """Return keys and values, float32 `[n, layers, 2, w]`."""
        names = ("cartridge_frozen", "cartridge_trained")
        return jnp.concatenate([leaves[name] for name in names if name in leaves])

    @staticmethod
    def compute(call: Call) -> Any:
        """Call the model with the table as its past."""
        return call_with_virtual(call, past=each_row(call, Cartridge.table))


def _sizes(params: Leaves) -> tuple[int, int, int]:
    layers, width = layers_and_width(params)
    return layers, 2, width


def _split(table: Any, frozen: int) -> dict[str, Any]:
    """Return the leaves of a table."""
    first = {"cartridge_frozen": table[:frozen]} if frozen else {}
    return {"cartridge_trained": table[frozen:], **first}
