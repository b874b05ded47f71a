r"""LoKr: an update that is a Kronecker product, with low-rank factors where that is smaller.

    y = x W + s x (K1 (x) K2),    K1: [in1, out1],    K2: [in2, out2],    in = in1 in2,
        out = out1 out2,    s = alpha / r

`in` and `out` are split into two factors each, near to one another or with the first near to
`decompose_factor`. `K2` is a product `B A` of rank r where r is below half its longer side, and so
is `K1` with `decompose_both`. With `x` as a matrix `[in1, in2]` the product is `K1' x K2`, so the
`[in, out]` matrix is never formed. `K1` starts at zero, so a fresh adapter does not change any
output.

Yeh et al. 2023, "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model
Evaluation", section 3 (arXiv:2309.14859).
"""

from __future__ import annotations

import functools
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
from jaxpeft.methods.loha import LoHa, uniform
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.targeted import Ranked, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_FACTORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")


@dataclass(frozen=True, kw_only=True)
class LoKr(Ranked):
    """Kronecker product at linear sites.

    Leaves of a site, the factors trained: `lokr_w1 [in1, out1]`, or `lokr_w1_a [r, out1]` and
    `lokr_w1_b [in1, r]`; `lokr_w2 [in2, out2]`, or `lokr_w2_a [r, out2]` and `lokr_w2_b [in2, r]`;
    `lokr_scale []`, and the rates of dropout where they are not zero, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "lokr"
    paper: ClassVar[str] = "arXiv:2309.14859"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(
            "lokr_scale",
            *_FACTORS,
            "lokr_rank_dropout",
            "lokr_rank_dropout_scale",
            "lokr_module_dropout",
        ),
        trained=frozenset(_FACTORS),
        # the sizes of the factors are options as well
        rank_pads=False,
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={leaf: leaf for leaf in _FACTORS},
        type="LOKR",
        options={
            **LoHa.peft.options,
            "decompose_both": "decompose_both",
            "decompose_factor": "decompose_factor",
            "rank_dropout_scale": "rank_dropout_scale",
        },
        required=("r", "alpha"),
        ignored=LoHa.peft.ignored,
    )

    decompose_both: bool = option(False, "also make the first factor low-rank")
    decompose_factor: int = option(
        -1, "target size of the first factor of in and out; -1 for their square roots"
    )
    rank_dropout: float = option(
        0.0, "probability of dropping an output of the update", at_least=0, below=1
    )
    rank_dropout_scale: bool = option(False, "scale up the outputs that rank_dropout does not drop")
    module_dropout: float = option(
        0.0, "probability of dropping the entire update of a site", at_least=0, below=1
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        wrong = self.decompose_factor < 1 and self.decompose_factor != -1
        found = (
            [f"decompose_factor: must be -1 or at least 1, is {self.decompose_factor}"]
            if wrong
            else []
        )
        return super().problems() + found

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Make `K1`, or its `A`, of zeros, the others uniform as in PEFT."""
        del kernel
        rank = self.site_rank(site.name)
        (in1, in2), (out1, out2) = (factors(n, self.decompose_factor) for n in site.shape)
        keys = jax.random.split(rng, 4)
        leaves = {"lokr_scale": jnp.asarray(self.site_scale(site.name), jnp.float32)}
        if self.decompose_both and rank < max(in1, out1) / 2:
            leaves["lokr_w1_a"] = jnp.zeros((rank, out1), jnp.float32)
            leaves["lokr_w1_b"] = uniform(keys[0], (in1, rank), in1)
        else:
            leaves["lokr_w1"] = jnp.zeros((in1, out1), jnp.float32)
        if rank < max(in2, out2) / 2:
            leaves["lokr_w2_a"] = uniform(keys[1], (rank, out2), rank)
            leaves["lokr_w2_b"] = uniform(keys[2], (in2, rank), in2)
        else:
            leaves["lokr_w2"] = uniform(keys[3], (in2, out2), in2)
        if self.rank_dropout and self.rank_dropout_scale:
            leaves["lokr_rank_dropout_scale"] = jnp.ones((), jnp.float32)
        return leaves | dropping.leaves(self.name, self.rank_dropout, self.module_dropout)

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + s x (K1 (x) K2)`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(call.x)
        update = call.each(_update, call.x.astype(y.dtype)).astype(y.dtype)
        return y + dropping.drop_update(
            call, LoKr.name, update, scaled="lokr_rank_dropout_scale" in call.leaves
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s K1 (x) K2`."""
        first, second = (
            functools.reduce(product, _factor(leaves, name)) for name in ("lokr_w1", "lokr_w2")
        )
        return {"kernel": base["kernel"] + leaves["lokr_scale"] * jnp.kron(first, second)}


def _update(leaves: Leaves, x: Any) -> Any:
    """Return `s K1' x K2` of `x` `[..., in]` as `[..., in1, in2]`."""
    first, second = _factor(leaves, "lokr_w1"), _factor(leaves, "lokr_w2")
    h = _times(x.reshape(*x.shape[:-1], -1, second[0].shape[0]), *second)
    h = _times(jnp.swapaxes(h, -1, -2), leaves["lokr_scale"] * first[0], *first[1:])
    return jnp.swapaxes(h, -1, -2).reshape(*x.shape[:-1], -1)


def _factor(leaves: Leaves, name: str) -> tuple[Any, ...]:
    """Return the matrices whose product is a factor."""
    return (leaves[f"{name}_b"], leaves[f"{name}_a"]) if f"{name}_b" in leaves else (leaves[name],)


def _times(x: Any, *matrices: Any) -> Any:
    for matrix in matrices:
        x = x @ matrix.astype(x.dtype)
    return x


def factors(n: int, near: int = -1) -> tuple[int, int]:
    """Split a number into two factors, the first not the larger but where `near` itself divides.

    Args:
        n: at least 1.
        near: what the first is at most, and equal to where it divides `n`; -1 for as near to one
            another as can be.
    """
    if near > 0 and n % near == 0:
        return near, n // near
    most = n if near == -1 else near
    first = max(m for m in range(1, math.isqrt(n) + 1) if n % m == 0 and m <= most)
    return first, n // first
