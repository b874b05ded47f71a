r"""LoHa: an update that is the elementwise product of two low-rank matrices.

    y = x W + s x ((B1 A1) * (B2 A2)),    B: [in, r],  A: [r, out],  s = alpha / r

The product has rank up to `r^2`. It is itself a product of two matrices, one row of the first being
the products of all pairs of `B1`'s and `B2`'s row, `[in, r^2]`, and likewise `[r^2, out]`: that way
where it takes less work than the `[in, out]` matrix. `B2` starts at zero and the others uniform, so
a fresh adapter does not change any output.

Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated
Learning", proposition 1 (arXiv:2108.06098); as an adapter, with its two ways of dropout, Yeh et al.
2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation",
section 3 (arXiv:2309.14859).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods import dropping
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.targeted import TARGET_OPTIONS, Ranked, TargetedFormat

if TYPE_CHECKING:
    from jax import Array


_LEAVES = (
    "loha_w1_a",
    "loha_w1_b",
    "loha_w2_a",
    "loha_w2_b",
    "loha_scale",
    "loha_rank_dropout",
    "loha_module_dropout",
)


@dataclass(frozen=True, kw_only=True)
class LoHa(Ranked):
    """Low-rank Hadamard product at linear sites.

    Leaves of a site: `loha_w1_a [r, out]`, `loha_w1_b [in, r]`, `loha_w2_a`, `loha_w2_b` likewise,
    trained; `loha_scale []`, and the rates of dropout where they are not zero, not trained. All
    float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "loha"
    paper: ClassVar[str] = "arXiv:2309.14859"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset(_LEAVES[:4]),
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={leaf: leaf.replace("loha", "hada") for leaf in _LEAVES[:4]},
        type="LOHA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "alpha": "alpha",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
            "rank_dropout": "rank_dropout",
            "module_dropout": "module_dropout",
        },
        required=("r", "alpha"),
        # only for convolutions
        ignored=frozenset({"init_weights", "use_effective_conv2d"}),
    )

    rank_dropout: float = option(
        0.0, "probability of dropping an output of the update", at_least=0, below=1
    )
    module_dropout: float = option(
        0.0, "probability of dropping the entire update of a site", at_least=0, below=1
    )

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Make `B2` of zeros, the others uniform as in PEFT."""
        del kernel
        (n_in, n_out), rank = site.shape, self.site_rank(site.name)
        keys = jax.random.split(rng, 3)
        return {
            "loha_w1_a": uniform(keys[0], (rank, n_out), rank),
            "loha_w1_b": uniform(keys[1], (n_in, rank), n_in),
            "loha_w2_a": uniform(keys[2], (rank, n_out), rank),
            "loha_w2_b": jnp.zeros((n_in, rank), jnp.float32),
            "loha_scale": jnp.asarray(self.site_scale(site.name), jnp.float32),
        } | dropping.leaves(self.name, self.rank_dropout, self.module_dropout)

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + s x ((B1 A1) * (B2 A2))`, `[..., in] -> [..., out]`, in the dtype of
        `x W`.
        """
        y = call.base(call.x)
        update = call.each(_update, call.x.astype(y.dtype)).astype(y.dtype)
        return y + dropping.drop_update(call, LoHa.name, update, scaled=True)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s (B1 A1) * (B2 A2)`."""
        return {"kernel": base["kernel"] + _product(leaves)}


def _update(leaves: Leaves, x: Any) -> Any:
    b1, a1, b2, a2 = (leaves[f"loha_{key}"] for key in ("w1_b", "w1_a", "w2_b", "w2_a"))
    (n_in, rank), n_out = b1.shape, a1.shape[1]
    if rank * rank * (n_in + n_out) < n_in * n_out:
        pairs_b = (b1[:, :, None] * b2[:, None, :]).reshape(n_in, rank * rank)
        pairs_a = (a1[:, None, :] * a2[None, :, :]).reshape(rank * rank, n_out)
        return low_rank(x, pairs_b, leaves["loha_scale"] * pairs_a)
    return multiply(_product, leaves, x)


def _product(leaves: Leaves) -> Any:
    """Return `s (B1 A1) * (B2 A2)`, `[in, out]`."""
    first = product(leaves["loha_w1_b"], leaves["loha_w1_a"])
    return leaves["loha_scale"] * first * product(leaves["loha_w2_b"], leaves["loha_w2_a"])


def uniform(key: Array, shape: tuple[int, ...], fan: int) -> Array:
    """Draw float32 numbers uniform within 1/sqrt(fan): Kaiming with a = sqrt(5), as in PEFT.

    Args:
        key: a key.
        shape: any.
        fan: what torch takes for the number of inputs.
    """
    bound = 1 / math.sqrt(fan)
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)
