r"""RandLora: a full-rank update from shared random bases scaled by trained diagonals.

    y = x W + s D(x) sum_j (G_j A' L_j) B_j',    s = alpha / r,  j < n = ceil(min(in, out) / r)

`A [r, 1, m]` and `B [M, n, r]` are frozen and stand once at the root of the tree, as large as the
largest adapted site, m and M being the smaller and the larger of its two sizes; a smaller site
takes its part of them (`A'`, `B'`). `L_j = diag(lambda[j])` `[r]` and `G_j = diag(gamma[:, j])`
`[min(in, out)]` are trained. This is for in <= out; otherwise the product is transposed, so that
the trained numbers are always on the smaller side. `lambda` starts at zero, so a fresh adapter
does not change any output. `D` is dropout.

PEFT pairs row `k` of the flattened bases, counted `(i, j)` over ranks and bases in A and `(j, i)`
in B. Its files mean that, and so it is done here; for a random B it is only another order of the
basis.

Albert et al. 2025, "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", section 4
(arXiv:2502.00987).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.targeted import TargetedFormat
from jaxpeft.methods.vera import VeRA, drop_projections, largest_sizes


@dataclass(frozen=True)
class RandLoraFormat(TargetedFormat["RandLora"]):
    """The file format of `RandLora` adapters."""

    def write_options(self, method: RandLora) -> dict[str, Any]:
        """Return the options; the bases are always in the file."""
        kinds = {
            "sparse": method.bases == "sparse",
            "very_sparse": method.bases == "very_sparse",
            "save_projection": True,
        }
        return super().write_options(method) | kinds

    def read_options(
        self, kind: type[RandLora], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file without its bases is an error."""
        # in PEFT the first of them takes precedence
        kinds = [kind for kind in ("very_sparse", "sparse") if config.get(kind)]
        values, problems = super().read_options(kind, config)
        return values | ({"bases": kinds[0]} if kinds else {}), [
            *problems,
            *drop_projections(config),
        ]


@dataclass(frozen=True, kw_only=True)
class RandLora(Biased):
    """Trained diagonals around shared random bases.

    Leaves of a site: `randlora_lambda [n, r]`, `randlora_gamma [min(in, out), n]`, trained;
    `randlora_scale []`, `randlora_dropout []` if the rate is not zero. At the root:
    `randlora_a [r, 1, m]`, `randlora_b [M, n, r]`, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "randlora"
    paper: ClassVar[str] = "arXiv:2502.00987"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("randlora_lambda", "randlora_gamma", "randlora_scale", "randlora_dropout"),
        root=("randlora_a", "randlora_b"),
        trained=frozenset({"randlora_lambda", "randlora_gamma"}),
    )
    peft: ClassVar[PeftFormat[Any]] = RandLoraFormat(
        type="RANDLORA",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "r": "rank",
            "randlora_alpha": "alpha",
            "randlora_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "randlora_alpha"),
        ignored=VeRA.peft.ignored | {"sparse", "very_sparse"},
        tensors={"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
        root_tensors={
            "randlora_a": "base_model.randlora_A",
            "randlora_b": "base_model.randlora_B",
        },
    )

    rank: int = option(
        32, "rank r of each random basis; a smaller rank trains more parameters", at_least=1
    )
    alpha: float = option(640.0, "numerator of the scaling alpha / rank", above=0)
    dropout: float = option(0.0, "rate of dropout on the input of the update", at_least=0, below=1)
    bases: Literal["dense", "sparse", "very_sparse"] = option(
        "dense",
        "uniform bases, or values -1, 0, 1 with 1/3 nonzero ('sparse') or 1/sqrt(m) nonzero"
        " ('very_sparse')",
    )
    bias: Literal["none", "all", "randlora_only"] = bias_option()

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize lambda to zero and gamma to a constant."""
        del kernel, rng
        smaller = min(site.shape)
        n = math.ceil(smaller / self.rank)
        leaves = {
            "randlora_lambda": jnp.zeros((n, self.rank), jnp.float32),
            "randlora_gamma": jnp.full((smaller, n), 1 / smaller, jnp.float32),
            "randlora_scale": jnp.asarray(self.alpha / self.rank, jnp.float32),
        }
        return leaves | (
            {"randlora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    def init_root(
        self, params: Leaves, sites: tuple[Site, ...], rng: jax.Array
    ) -> dict[str, jax.Array]:
        """Draw the bases, with unit variance."""
        del params
        smaller, larger = sorted(largest_sizes(sites))
        shapes = (self.rank, 1, smaller), (larger, math.ceil(smaller / self.rank), self.rank)
        a, b = (
            self._basis(key, shape, smaller)
            for key, shape in zip(jax.random.split(rng), shapes, strict=True)
        )
        return {"randlora_a": a, "randlora_b": b}

    def _basis(self, key: jax.Array, shape: tuple[int, ...], smaller: int) -> jax.Array:
        drawn = jax.random.uniform(key, shape, jnp.float32, -1, 1)
        if self.bases != "dense":
            share = 1 / 3 if self.bases == "sparse" else 1 / math.sqrt(smaller)
            drawn = jnp.where(jnp.abs(drawn) > 1 - share, jnp.sign(drawn), 0.0)
        return drawn / jnp.std(drawn)

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + s (D(x) P) Q`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        return y + call.each(
            _update, drop_input(call, call.x.astype(y.dtype), "randlora_dropout"), y
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s P Q`."""
        first, second = _factors(leaves, *base["kernel"].shape)
        return {"kernel": base["kernel"] + leaves["randlora_scale"] * product(first, second)}


def _factors(leaves: Leaves, n_in: int, n_out: int) -> tuple[Any, Any]:
    """Return P `[in, n r]` and Q `[n r, out]` of the update."""
    gamma, weights = leaves["randlora_gamma"], leaves["randlora_lambda"]
    smaller, n = gamma.shape
    a = leaves["randlora_a"][:, 0, :smaller].T  # [m, r]
    scaled = (a[:, :, None] * weights.T * gamma[:, None, :]).reshape(smaller, -1)
    plain = leaves["randlora_b"][: max(n_in, n_out), :n].reshape(max(n_in, n_out), -1)
    return (scaled, plain.T) if n_in <= n_out else (plain, scaled.T)


def _update(leaves: Leaves, x: Any, y: Any) -> Any:
    """Return `s (x P) Q`, `[..., in] -> [..., out]`, in the dtype of `x`."""
    first, second = _factors(leaves, x.shape[-1], y.shape[-1])
    return (x @ first.astype(x.dtype)) @ (leaves["randlora_scale"] * second).astype(x.dtype)
