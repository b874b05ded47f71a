r"""BEFT: a trained bias is added to the outputs of a few linear modules.

    y = x W + b0 + b,    b: [out]

Biases of value projections are the most effective ones, and the default. A module without a bias
`b0` can be adapted, too, but then the adapter cannot be merged. `b` starts at zero, so a fresh
adapter does not change any output.

Huang et al. 2025, "BEFT: Bias-Efficient Fine-Tuning of Language Models" (arXiv:2509.15974).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jnp
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    from jax import Array


@dataclass(frozen=True)
class BEFTFormat(TargetedFormat["BEFT"]):
    """The file format of `BEFT` adapters."""

    def pack(self, method: BEFT, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the bias as one row."""
        return {name: leaf[None] for name, leaf in super().pack(method, site, leaves).items()}

    def unpack(self, method: BEFT, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the bias from its row."""
        rows = {name: tensor[0] for name, tensor in tensors.items()}
        return super().unpack(method, site, rows, fresh)


@dataclass(frozen=True, kw_only=True)
class BEFT(Targeted):
    """Added biases of linear sites.

    Leaves of a site: `beft_bias [out]`, float32, trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "beft"
    paper: ClassVar[str] = "arXiv:2509.15974"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("beft_bias",),
        trained=frozenset({"beft_bias"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = BEFTFormat(
        tensors={"beft_bias": "beft_bias"},
        type="BEFT",
        options={"target_modules": "targets"},
        ignored=frozenset({"init_weights"}),
    )
    usual_targets: ClassVar[tuple[str, ...]] = ("v_proj", "value", "v_lin", "value_proj")

    targets: str | tuple[str, ...] = option(
        "default",
        "list of name suffixes, a regular expression, 'all-linear', or 'default' for value"
        " projections",
    )

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize the bias to zeros."""
        del kernel, rng
        return {"beft_bias": jnp.zeros((site.shape[1],), jnp.float32)}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + b0 + b`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        return call.each(
            lambda leaves, y: y + leaves["beft_bias"].astype(y.dtype), call.base(*call.args)
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `b0 + b`."""
        return {"bias": base.get("bias", 0.0) + leaves["beft_bias"]}
