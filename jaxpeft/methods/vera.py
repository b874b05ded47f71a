r"""VeRA: two trained vectors per site, around a pair of random matrices shared by all sites.

    y = x W + (((D(x) A') * d) B') * b,    A' = A[:in] [in, r],    B' = B[:, :out] [r, out],
        d: [r],    b: [out]

`A` and `B` are frozen and stand once at the root of the tree, as wide as the widest adapted site; a
narrower site takes its part of them. `d` starts at a small constant and `b` at zero, so a fresh
adapter does not change any output. `D` is dropout.

PEFT may leave `A` and `B` out of a file and make them again from torch's random numbers. Here they
are always written out, and a file without them is refused.

Kopiczko et al. 2023, "VeRA: Vector-based Random Matrix Adaptation", section 3 (arXiv:2310.11454).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.targeted import TargetedFormat


@dataclass(frozen=True)
class VeRAFormat(TargetedFormat["VeRA"]):
    """The file format of `VeRA` adapters."""

    def write_options(self, method: VeRA) -> dict[str, Any]:
        """Return the options; the projections are always in the file."""
        return super().write_options(method) | {"save_projection": True}

    def read_options(
        self, kind: type[VeRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file without its projections is an error."""
        values, problems = super().read_options(kind, config)
        return values, [*problems, *drop_projections(config)]


def _low_rank_update(shape: tuple[int, int], leaves: Leaves) -> LowRank:
    """Return the update of a site, with `A * d` as A and `B * b` as B."""
    a, b = leaves["vera_a"][: shape[0]], leaves["vera_b"][:, : shape[1]]
    return LowRank(a * leaves["vera_lambda_d"], b * leaves["vera_lambda_b"], 1.0)


@dataclass(frozen=True, kw_only=True)
class VeRA(Biased):
    """Trained vectors around shared random projections.

    Leaves of a site: `vera_lambda_d [r]`, `vera_lambda_b [out]`, trained; `vera_dropout []` where
    the rate is not zero. At the root: `vera_a [in, r]`, `vera_b [r, out]` of the largest sizes, not
    trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "arXiv:2310.11454"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("vera_lambda_b", "vera_lambda_d", "vera_dropout"),
        root=("vera_a", "vera_b"),
        trained=frozenset({"vera_lambda_b", "vera_lambda_d"}),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(update=_low_rank_update)
    peft: ClassVar[PeftFormat[Any]] = VeRAFormat(
        type="VERA",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "r": "rank",
            "vera_dropout": "dropout",
            "d_initial": "d_initial",
            "bias": "bias",
        },
        required=("r",),
        ignored=frozenset({"save_projection", "projection_prng_key", "init_weights"}),
        tensors={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
        root_tensors={"vera_a": "base_model.vera_A", "vera_b": "base_model.vera_B"},
    )

    rank: int = option(256, "rank r of the shared projections", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    d_initial: float = option(0.1, "initial value of the entries of d")
    bias: Literal["none", "all", "vera_only"] = bias_option()

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize d to a constant and b to zero."""
        del kernel, rng
        leaves = {
            "vera_lambda_b": jnp.zeros((site.shape[1],), jnp.float32),
            "vera_lambda_d": jnp.full((self.rank,), self.d_initial, jnp.float32),
        }
        return leaves | (
            {"vera_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Make A and B uniform within sqrt(6 / fan_in), as He et al. 2015 have it."""
        del params
        keys, n_in, n_out = jax.random.split(rng), *largest_sizes(sites)
        return {
            "vera_a": (
                math.sqrt(6 / n_in)
                * jax.random.uniform(keys[0], (n_in, self.rank), jnp.float32, -1, 1)
            ),
            "vera_b": (
                math.sqrt(6 / self.rank)
                * jax.random.uniform(keys[1], (self.rank, n_out), jnp.float32, -1, 1)
            ),
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (((D(x) A) * d) B) * b`, `[..., in] -> [..., out]`, in `x W`'s dtype."""
        y = call.base(*call.args)
        return y + call.each(_update, drop_input(call, call.x.astype(y.dtype), "vera_dropout"))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + (A * d) (B * b)`."""
        added = _low_rank_update(base["kernel"].shape, leaves)
        return {"kernel": base["kernel"] + product(added.a, added.b)}


def drop_projections(config: Mapping[str, Any]) -> list[str]:
    """Return the problem of a file without its random matrices, if any."""
    if config.get("save_projection", True):
        return []
    why = (
        "so the shared random matrices are not in the file, and cannot be regenerated without torch"
    )
    return [
        (f"save_projection: is false, {why}; save the adapter in PEFT with save_projection=True")
    ]


def largest_sizes(sites: tuple[Site, ...]) -> tuple[int, int]:
    """Return the largest `in` and the largest `out` of sites."""
    return max(site.shape[0] for site in sites), max(site.shape[1] for site in sites)


def _update(leaves: Leaves, x: Any) -> Any:
    """Return `(((x A) * d) B) * b`, `[..., in] -> [..., out]`, in the dtype of `x`."""
    b = leaves["vera_lambda_b"].astype(x.dtype)
    h = (
        x
        @ leaves["vera_a"][: x.shape[-1]].astype(x.dtype)
        * leaves["vera_lambda_d"].astype(x.dtype)
    )
    return h @ leaves["vera_b"][:, : b.shape[-1]].astype(x.dtype) * b
