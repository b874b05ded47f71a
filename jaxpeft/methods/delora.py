r"""DeLoRA: a low-rank update whose angles and strength are trained separately.

    y = x W + (x * n) A diag(l / (r |ai| |bi|)) B,    A: [in, r],    B: [r, out],
        ai, bi: their columns and rows,    l: []

`n: [in]` holds the norms of the rows of `W`. Each of the r products of a column and a row has norm
one, so the update is never longer than the boundary `l` times that of `W`, however far `A` and `B`
go. `B` starts at zero, so a fresh adapter does not change any output; norms below 1e-4 count as
that.

Bini et al. 2025, "Decoupling Angles and Strength in Low-rank Adaptation", section 3
(arXiv:2503.18225).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site, pattern_value, require_patterns
from jaxpeft.lazy import jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_SHORTEST = 1e-4


@dataclass(frozen=True, kw_only=True)
class DeLoRA(Biased):
    """Low-rank adaptation of linear sites with a bounded strength.

    Leaves of a site: `delora_a [in, r]`, `delora_b [r, out]` and `delora_lambda [1]`, trained;
    `delora_w_norm [in]`, `delora_share []`, which is 1 / r, and `delora_dropout []` where the rate
    is not zero, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "delora"
    paper: ClassVar[str] = "arXiv:2503.18225"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(
            "delora_a",
            "delora_b",
            "delora_lambda",
            "delora_w_norm",
            "delora_share",
            "delora_dropout",
        ),
        trained=frozenset({"delora_a", "delora_b", "delora_lambda"}),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(
        update=lambda shape, leaves: LowRank(*_factors(leaves), 1.0)
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={
            "delora_a": "delora_A",
            "delora_b": "delora_B",
            "delora_lambda": "delora_lambda",
            "delora_w_norm": "delora_w_norm",
        },
        type="DELORA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "delora_lambda": "boundary",
            "rank_pattern": "rank_pattern",
            "lambda_pattern": "boundary_pattern",
            "module_dropout": "dropout",
            "bias": "bias",
        },
        required=("r",),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(8, "rank r of the update", at_least=1)
    boundary: float = option(15.0, "initial value of the boundary l", above=0)
    rank_pattern: dict[str, int] = option({}, "other ranks, by suffix of a site's name", at_least=1)
    boundary_pattern: dict[str, float] = option(
        {}, "other boundaries, by suffix of a site's name", above=0
    )
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    bias: Literal["none", "all", "delora_only"] = bias_option()

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        own = {"rank_pattern": self.rank_pattern, "boundary_pattern": self.boundary_pattern}
        return super().expressions(whole) | own

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if a rank or boundary pattern matches no adapted site.

        Raises:
            TargetError: A pattern is invalid; it names it.
        """
        require_patterns("rank_pattern", self.rank_pattern, names)
        require_patterns("boundary_pattern", self.boundary_pattern, names)

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize A to uniform values and B to zeros, and store the kernel's row norms."""
        (n_in, n_out), rank = site.shape, pattern_value(site.name, self.rank_pattern, self.rank)
        boundary = pattern_value(site.name, self.boundary_pattern, self.boundary)
        leaves = {
            "delora_a": uniform(rng, (n_in, rank), n_in),
            "delora_b": jnp.zeros((rank, n_out), jnp.float32),
            "delora_lambda": jnp.full((1,), boundary, jnp.float32),
            "delora_w_norm": jnp.linalg.norm(kernel(), axis=1),
            "delora_share": jnp.asarray(1 / rank, jnp.float32),
        }
        return leaves | (
            {"delora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (x * n) A diag(l / (r |ai| |bi|)) B`, `[..., in] -> [..., out]`, in the
        dtype of `x W`.
        """
        y = call.base(call.x)
        x = drop_input(call, call.x.astype(y.dtype), "delora_dropout")
        return y + call.each(lambda leaves, x: low_rank(x, *_factors(leaves)), x).astype(y.dtype)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + diag(n) A diag(l / (r |ai| |bi|)) B`."""
        return {"kernel": base["kernel"] + product(*_factors(leaves))}


def _factors(leaves: Leaves) -> tuple[Any, Any]:
    """Return `[in, r]` and `[r, out]` whose product is the update."""
    a, b = leaves["delora_a"], leaves["delora_b"]
    strength = leaves["delora_lambda"] * leaves["delora_share"] / (_norm(a, 0) * _norm(b, 1))
    return leaves["delora_w_norm"][:, None] * a, strength[:, None] * b


def _norm(matrix: Any, axis: int) -> Any:
    return jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(matrix), axis=axis), _SHORTEST**2))
