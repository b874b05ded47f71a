r"""HRA: the input of a frozen kernel is reflected an even number of times, a low-rank rotation.

    y = (x Hr ... H1) W + b,    Hi = I - 2 ui ui' / |ui|^2,    ui: [in], the columns of U: [in, r]

Two reflections that follow one another, at `u` and `v` of length one with `e = v - u`, are

    x -> x + [x u, x e] [2 e - 2 |e|^2 v; -2 v]'

so a fresh adapter, whose columns are equal in pairs (`e = 0`), does not change any output, bit
by bit. The products of all pairs are gathered into one, `x + (x P) K` with `P: [in, r]` and
`K: [r, in]`. With `gram_schmidt` the columns are made orthonormal first, and all are one reflection
at a subspace, `x - 2 (x Q) Q'`; it begins anywhere, not at the base.

Yuan et al. 2024, "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder
Reflection Adaptation", section 3 (arXiv:2405.17484).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods import rotations
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class HRA(Biased):
    """Householder reflections of the inputs of linear sites.

    Leaves of a site: `hra_u [in, r]`, trained; `hra_gram_schmidt []` where it is asked for, not
    trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "hra"
    paper: ClassVar[str] = "arXiv:2405.17484"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("hra_u", "hra_gram_schmidt"),
        trained=frozenset({"hra_u"}),
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={"hra_u": "hra_u"},
        untransposed=frozenset({"hra_u"}),
        type="HRA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "apply_GS": "gram_schmidt",
            "bias": "bias",
        },
        required=("r",),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(8, "number r of reflections, even", at_least=2)
    gram_schmidt: bool = option(False, "make the columns of U orthonormal first")
    bias: Literal["none", "all", "hra_only"] = bias_option()

    def problems(self) -> list[str]:
        """List incompatible options: the rank must be even."""
        odd = self.rank % 2 == 1 and not self.gram_schmidt
        why = (
            f"rank: must be even, since only pairs of reflections can start as the identity, is"
            f" {self.rank}"
        )
        return super().problems() + ([why] if odd else [])

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize U to uniform values with equal pairs of columns.

        With Gram-Schmidt, all columns are independent.
        """
        del kernel
        n_in = site.shape[0]
        if self.gram_schmidt:
            return {
                "hra_u": uniform(rng, (n_in, self.rank), self.rank),
                "hra_gram_schmidt": jnp.ones((), jnp.float32),
            }
        return {
            "hra_u": jnp.repeat(uniform(rng, (n_in, self.rank // 2), self.rank // 2), 2, axis=1)
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `(x + (x P) K) W + b`, `[..., in] -> [..., out]`."""
        return rotations.compute_with_input(
            call, lambda leaves, x: x + low_rank(x, *_factors(leaves))
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + P (K W)`."""
        p, k = _factors(leaves)
        return {"kernel": base["kernel"] + product(p, product(k, base["kernel"]))}


def _factors(leaves: Leaves) -> tuple[Any, Any]:
    """Return `P [in, r]` and `K [r, in]` of `x -> x + (x P) K`; zero columns have no effect."""
    columns = leaves["hra_u"]
    if "hra_gram_schmidt" in leaves:
        q = _orthonormal(columns)
        return q, -2.0 * q.T
    units = _unit(columns)
    # x Hr ... H1: the last column reflects first
    u, v = units[:, 1::2][:, ::-1], units[:, 0::2][:, ::-1]
    e = v - u
    p = jnp.stack([u, e], axis=2).reshape(units.shape)
    k = (
        jnp.stack([2.0 * e - 2.0 * jnp.sum(e * e, axis=0) * v, -2.0 * v], axis=2)
        .reshape(units.shape)
        .T
    )
    # the input of a pair has passed through the pairs before it: z = x P + z N, where N is what
    # they add to its x u and x e
    rank = units.shape[1]
    before = (jnp.arange(rank) // 2)[:, None] < (jnp.arange(rank) // 2)[None, :]
    added = jnp.where(before, product(k, p), 0.0)
    return p, jax.scipy.linalg.solve_triangular(
        jnp.eye(rank, dtype=k.dtype) - added, k, lower=False
    )


def _orthonormal(columns: Any) -> Any:
    """Orthonormalize columns by Gram-Schmidt."""
    out: list[Any] = []
    for i in range(columns.shape[1]):
        out.append(_unit(columns[:, i : i + 1]))
        columns = columns - out[-1] * product(out[-1].T, columns)
    return jnp.concatenate(out, axis=1)


def _unit(columns: Any) -> Any:
    """Normalize columns to length one; zeros stay zeros."""
    return columns / jnp.sqrt(jnp.maximum(jnp.sum(jnp.square(columns), axis=0), _TINY))
