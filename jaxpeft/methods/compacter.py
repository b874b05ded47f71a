r"""Compacter: bottleneck adapters whose matrices are sums of Kronecker products, with one rule for
all sites.

    A(z) = D(s (act(z W_down + b_down) W_up + b_up)),    W = sum_i R_i (x) (L_i V_i)

    R: [n, n, n],    L: [n, in / n, r],    V: [n, r, out / n],    (x) the Kronecker product,
        n = phm_dim,    r = rank

`R` stands once at the root of the tree and is trained like the rest. What `z` is, and where `A(z)`
is added, `placement` says: see `jaxpeft.methods.bottleneck`; Compacter++ is `pfeiffer`. `L` of
`W_up` and the biases start at zero, so a fresh adapter does not change any output (the
`adapters` library draws all factors; it starts a little off the base).

Karimi Mahabadi et al. 2021, "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", section 3
(arXiv:2106.04647).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.bottleneck import (
    Bottleneck,
    BottleneckFormat,
    NonLinearity,
    Placement,
    add_to_output,
    bottleneck,
    join_residual,
    leaf_names,
)

_RULES: Mapping[str, Any] = {
    "phm_layer": True,
    "phm_bias": True,
    "learn_phm": True,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "factorized_phm_W": True,
    "shared_W_phm": False,
}
_MATRICES = ("down_left", "down_right", "down_bias", "up_left", "up_right", "up_bias")


_LEAVES = leaf_names("compacter", *_MATRICES)


@dataclass(frozen=True)
class CompacterFormat(BottleneckFormat["Compacter"]):
    """The file format of `Compacter` adapters."""

    def write_options(self, method: Compacter) -> dict[str, Any]:
        """Return the options in the format of the adapters library."""
        return {**super().write_options(method), **_RULES}

    def read_options(
        self, kind: type[Compacter], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options of the adapters library; other sharing or factorization is an error."""
        values, problems = super().read_options(kind, config)
        other = {key: config[key] for key, ours in _RULES.items() if config.get(key, ours) != ours}
        return values, problems + [
            f"{key}: {value!r} is not supported by the compacter method; nothing was loaded"
            for key, value in other.items()
        ]


@dataclass(frozen=True, kw_only=True)
class Compacter(Bottleneck):
    """Bottleneck adapters made of Kronecker products.

    Leaves of a site: `compacter_down_left [n, d/n, r]`, `compacter_down_right [n, r, b/n]`,
    `compacter_down_bias [b]`, the same with `up` from b to d, trained; beside them those of every
    bottleneck adapter. At the root: `compacter_rule [n, n, n]`, trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "compacter"
    paper: ClassVar[str] = "arXiv:2106.04647"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        root=("compacter_rule",),
        trained=frozenset(
            {"compacter_rule", "compacter_gain", *(f"compacter_{key}" for key in _MATRICES)}
        ),
    )
    peft: ClassVar[PeftFormat[Any]] = Bottleneck.peft.replace(
        CompacterFormat,
        options={
            **Bottleneck.peft.options,
            "phm_dim": "phm_dim",
            "phm_rank": "rank",
            "phm_init_range": "rule_range",
        },
        tensors={
            "compacter_down_left": "adapter_down.0.W_left",
            "compacter_down_right": "adapter_down.0.W_right",
            "compacter_down_bias": "adapter_down.0.b",
            "compacter_up_left": "adapter_up.W_left",
            "compacter_up_right": "adapter_up.W_right",
            "compacter_up_bias": "adapter_up.b",
            "compacter_gain": "scaling",
        },
        root_tensors={"compacter_rule": "phm_rule"},
    )
    factored: ClassVar[bool] = True

    placement: Placement = option("houlsby", "input of the adapter: houlsby, pfeiffer, parallel")
    reduction_factor: float = option(
        32.0, "d / b: ratio of the model's width to the bottleneck's", above=0
    )
    non_linearity: NonLinearity = option("gelu", "activation in the bottleneck")
    phm_dim: int = option(
        4, "number n of Kronecker products in the sum, which must divide d and b", at_least=1
    )
    rank: int = option(1, "rank r of the second factor of each product", at_least=1)
    rule_range: float = option(1e-4, "initial standard deviation of the rule", above=0)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Make the factors as Glorot and Bengio 2010 have it, the left one of `W_up` and the biases
        zero.

        Raises:
            ConfigError: `phm_dim` does not divide a width.
        """
        del kernel
        d, b, n, r = site.shape[1], self.width(site), self.phm_dim, self.rank
        if d % n or b % n:
            raise ConfigError(
                f"compacter.phm_dim: {n} does not divide both the width {d} of {site.name} and its"
                f" bottleneck's, {b}; choose another phm_dim or reduction_factor"
            )
        keys = jax.random.split(rng, 3)
        own = {
            "down_left": _glorot(keys[0], n, d // n, r),
            "down_right": _glorot(keys[1], n, r, b // n),
            "down_bias": jnp.zeros((b,)),
            "up_left": jnp.zeros((n, b // n, r)),
            "up_right": _glorot(keys[2], n, r, d // n),
            "up_bias": jnp.zeros((d,)),
        }
        return self.site_leaves(site, own)

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Make the rule."""
        del params, sites
        return {
            "compacter_rule": (
                self.rule_range * jax.random.normal(rng, (self.phm_dim,) * 3, jnp.float32)
            )
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `N(x + h + A(z))`, `[..., d]`, in the dtype of `h`."""
        return join_residual(call, "compacter", _network)

    @staticmethod
    def compute_alone(call: Call) -> Any:
        """Compute `h + A(h)`, `[..., in] -> [..., d]`."""
        return add_to_output(call, "compacter", _network)


def _glorot(key: jax.Array, n: int, rows: int, columns: int) -> jax.Array:
    return math.sqrt(2 / (rows + columns)) * jax.random.normal(key, (n, rows, columns))


def _network(leaves: Leaves, z: Any) -> Any:
    """Return `A(z)` without dropout, `[..., d] -> [..., d]`."""
    down, up = (
        kronecker(
            leaves["compacter_rule"],
            leaves[f"compacter_{side}_left"],
            leaves[f"compacter_{side}_right"],
        )
        for side in ("down", "up")
    )
    return bottleneck(leaves, "compacter", z, down, up)


def kronecker(rule: jax.Array, left: jax.Array, right: jax.Array) -> jax.Array:
    """Return `sum_i R_i (x) (L_i V_i)`, `[in, out]`.

    Args:
        rule: `R [n, n, n]`.
        left: `L [n, in / n, r]`.
        right: `V [n, r, out / n]`.
    """
    blocks = jnp.einsum("iab,icr,ird->acbd", rule, left, right, precision="highest")
    return blocks.reshape(blocks.shape[0] * blocks.shape[1], -1)
