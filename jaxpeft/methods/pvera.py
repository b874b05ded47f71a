r"""PVeRA: VeRA whose hidden values are drawn, in training, from a normal distribution.

    y = x W + (h B') * b,    h = m + exp(v / 2) * e,    [m, v] = (D(x) A') * d,    e ~ N(0, I),
        A' = A[:in] [in, 2 r],    B' = B[:, :out] [r, out],    d: [2 r],    b: [out]

Outside of training, `h = m`. `A` and `B` are frozen, random, and stand once at the root of the
tree, as those of VeRA. `d` starts at a small constant and `b` at zero, so a fresh adapter does not
change any output. `D` is dropout.

PEFT may leave `A` and `B` out of a file and make them again from torch's random numbers. Here they
are always written out, and a file without them is refused.

Fillioux et al. 2025, "PVeRA: Probabilistic Vector-Based Random Matrix Adaptation"
(arXiv:2512.07703).
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
from jaxpeft.methods.vera import drop_projections, largest_sizes


@dataclass(frozen=True)
class PVeRAFormat(TargetedFormat["PVeRA"]):
    """The file format of `PVeRA` adapters."""

    def write_options(self, method: PVeRA) -> dict[str, Any]:
        """Return the options; the projections are always in the file."""
        return super().write_options(method) | {"save_projection": True}

    def read_options(
        self, kind: type[PVeRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file without its projections, is an error."""
        values, problems = super().read_options(kind, config)
        return values, [*problems, *drop_projections(config)]


def _low_rank_update(shape: tuple[int, int], leaves: Leaves) -> LowRank:
    """Return the update of a site by the mean, with `A * d` as A and `B * b` as B."""
    b = leaves["pvera_b"][:, : shape[1]]
    rank = b.shape[0]
    a = leaves["pvera_a"][: shape[0], :rank]
    return LowRank(a * leaves["pvera_lambda_d"][:rank], b * leaves["pvera_lambda_b"], 1.0)


@dataclass(frozen=True, kw_only=True)
class PVeRA(Biased):
    """Trained vectors around shared random projections, with noise in training.

    Leaves of a site: `pvera_lambda_d [2 r]`, `pvera_lambda_b [out]`, trained; `pvera_dropout []`
    where the rate is not zero. At the root: `pvera_a [in, 2 r]`, `pvera_b [r, out]` of the largest
    sizes, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "pvera"
    paper: ClassVar[str] = "arXiv:2512.07703"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("pvera_lambda_b", "pvera_lambda_d", "pvera_dropout"),
        root=("pvera_a", "pvera_b"),
        trained=frozenset({"pvera_lambda_b", "pvera_lambda_d"}),
        # mean and variance are halves of one axis, so padding is not at the end of either
        rank_pads=False,
    )
    sites: ClassVar[SiteSpec] = SiteSpec(update=_low_rank_update)
    peft: ClassVar[PeftFormat[Any]] = PVeRAFormat(
        type="PVERA",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "r": "rank",
            "pvera_dropout": "dropout",
            "d_initial": "d_initial",
            "bias": "bias",
        },
        required=("r",),
        ignored=frozenset(
            {"save_projection", "projection_prng_key", "init_weights", "generator_seed"}
        ),
        tensors={"pvera_lambda_b": "pvera_lambda_b", "pvera_lambda_d": "pvera_lambda_d"},
        root_tensors={"pvera_a": "base_model.pvera_A", "pvera_b": "base_model.pvera_B"},
    )

    rank: int = option(256, "rank r of the shared projections", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    d_initial: float = option(0.1, "initial value of the entries of d")
    bias: Literal["none", "all", "pvera_only"] = bias_option()

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize d to a constant and b to zero."""
        del kernel, rng
        leaves = {
            "pvera_lambda_b": jnp.zeros((site.shape[1],), jnp.float32),
            "pvera_lambda_d": jnp.full((2 * self.rank,), self.d_initial, jnp.float32),
        }
        return leaves | (
            {"pvera_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Make A and B uniform within sqrt(6 / fan_in), as He et al. 2015 have it."""
        del params
        keys, n_in, n_out = jax.random.split(rng), *largest_sizes(sites)
        shapes = {"pvera_a": (n_in, 2 * self.rank), "pvera_b": (self.rank, n_out)}
        return {
            name: math.sqrt(6 / shape[0]) * jax.random.uniform(key, shape, jnp.float32, -1, 1)
            for key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (h B) * b`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = drop_input(call, call.x.astype(y.dtype), "pvera_dropout")
        if call.dropout_key is None:
            return y + call.each(_update, x)
        shape = (*x.shape[:-1], call.leaves["pvera_b"].shape[-2])
        return y + call.each(_update, x, jax.random.normal(call.dropout_key(), shape, x.dtype))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + (A_m * d_m) (B * b)`, the update by the mean."""
        added = _low_rank_update(base["kernel"].shape, leaves)
        return {"kernel": base["kernel"] + product(added.a, added.b)}


def _update(leaves: Leaves, x: Any, noise: Any = None) -> Any:
    """Return `(h B) * b`, `[..., in] -> [..., out]`, in the dtype of `x`, with `e` as `noise`."""
    added = _low_rank_update((x.shape[-1], leaves["pvera_lambda_b"].shape[-1]), leaves)
    h = x @ added.a.astype(x.dtype)
    if noise is not None:
        rank = noise.shape[-1]
        a = leaves["pvera_a"][: x.shape[-1], rank:] * leaves["pvera_lambda_d"][rank:]
        h = h + jnp.exp((x @ a.astype(x.dtype)) / 2) * noise
    return h @ added.b.astype(x.dtype)
