r"""DEFT: a subspace of the outputs is taken out of the frozen kernel, and trained anew.

    y = x (W - W N Q) + s D(x) R Q,    R: [in, r],    N Q: a projection, [out, r] by [r, out],
        s = alpha / r, or 1 without an alpha

`Q` is trained, as `P: [r, out]`. With `projection` 'relu', `Q = P` and `N = relu(P)'`, which is not
orthogonal; with 'qr', the rows of `Q` are an orthonormal basis of those of `P`, and `N = Q'`. `R`
starts at `W N / s`, so that a fresh adapter does not change the outputs, up to rounding. Without
`inject`, there is no `R` (the method PaRa), and the subspace is only removed. `D` is dropout.

Kumar et al. 2025, "DEFT: Decompositional Efficient Fine-Tuning for Text-to-Image Models"
(arXiv:2509.22793).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_STD = 0.02
"""Initial standard deviation of P."""


@dataclass(frozen=True)
class DEFTFormat(TargetedFormat["DEFT"]):
    """The file format of `DEFT` adapters."""

    def write_options(self, method: DEFT) -> dict[str, Any]:
        """Return the options; PEFT's switch says that nothing is injected."""
        return super().write_options(method) | {"para": not method.inject}

    def read_options(
        self, kind: type[DEFT], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options."""
        values, problems = super().read_options(kind, config)
        return values | {"inject": not config.get("para")}, problems


@dataclass(frozen=True, kw_only=True)
class DEFT(Biased):
    """A replaced subspace of the outputs of linear sites.

    Leaves of a site: `deft_p [r, out]`, `deft_r [in, r]`, trained; `deft_scale []`; `deft_qr []`
    for the orthogonal projection, and `deft_dropout []` where the rate is not zero, not trained.
    All float32. `r` is at most the number of outputs.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "deft"
    paper: ClassVar[str] = "arXiv:2509.22793"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("deft_p", "deft_r", "deft_scale", "deft_qr", "deft_dropout"),
        trained=frozenset({"deft_p", "deft_r"}),
        # zeros have no orthonormal basis
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = DEFTFormat(
        tensors={"deft_p": "deft_P", "deft_r": "deft_R"},
        type="DEFT",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "alpha": "alpha",
            "decomposition_method": "projection",
            "deft_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "decomposition_method"),
        ignored=frozenset({"init_weights", "init_scale", "para"}),
    )

    rank: int = option(8, "rank r of the projection", at_least=1)
    alpha: int | None = option(
        None,
        "numerator of the scaling alpha / rank of the injection; None for no scaling",
        at_least=1,
    )
    projection: Literal["relu", "qr"] = option(
        "relu", "projection: 'relu' (not orthogonal) or 'qr' (orthogonal)"
    )
    inject: bool = option(True, "train what replaces the subspace, instead of only removing it")
    dropout: float = option(0.0, "rate of dropout on the input of R", at_least=0, below=1)
    bias: Literal["none", "all", "deft_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical: only up to rounding."""
        return False

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Draw P, and initialize R to what is removed."""
        n_out = site.shape[1]
        rank = min(self.rank, n_out)
        leaves = {
            "deft_p": _STD * jax.random.normal(rng, (rank, n_out), jnp.float32),
            "deft_scale": jnp.asarray(self.alpha / rank if self.alpha else 1.0, jnp.float32),
        }
        if self.projection == "qr":
            leaves["deft_qr"] = jnp.ones((), jnp.float32)
        if self.dropout:
            leaves["deft_dropout"] = jnp.asarray(self.dropout, jnp.float32)
        if self.inject:
            leaves["deft_r"] = product(kernel(), _projection(leaves)[0]) / leaves["deft_scale"]
        return leaves

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (s D(x) R - x W N) Q`, `[..., in] -> [..., out]`, in the dtype of `x W`.

        Without dropout, the difference is that of the matrices: it is small where both are large.
        """
        y = call.base(*call.args)
        x = call.x.astype(y.dtype)
        dropped = drop_input(call, x, "deft_dropout")
        drops = dropped is not x

        def update(leaves: Leaves, x: Any, dropped: Any) -> Any:
            h = multiply(partial(_difference, call.kernel, drops), leaves, x)
            if drops and "deft_r" in leaves:
                h = h + dropped @ (leaves["deft_scale"] * leaves["deft_r"]).astype(x.dtype)
            return h @ _projection(leaves)[1].astype(x.dtype)

        return y + call.each(update, x, dropped)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + (s R - W N) Q`."""
        kernel = base["kernel"]
        difference = _difference(lambda: base.get("original", kernel), False, leaves)
        return {"kernel": kernel + product(difference, _projection(leaves)[1])}


def _projection(leaves: Leaves) -> tuple[Any, Any]:
    """Return N `[out, r]` and Q `[r, out]`."""
    p = leaves["deft_p"]
    if "deft_qr" not in leaves:
        return jax.nn.relu(p).T, p
    basis = jnp.linalg.qr(p.T)[0]
    return basis, basis.T


def _difference(kernel: Kernel, removed_only: bool, leaves: Leaves) -> Any:
    """Return `s R - W N`, `[in, r]`, or `-W N`."""
    removed = product(kernel(), _projection(leaves)[0])
    if removed_only or "deft_r" not in leaves:
        return -removed
    return leaves["deft_scale"] * leaves["deft_r"] - removed
