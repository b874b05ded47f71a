r"""HiRA: an update that is the elementwise product of the kernel and a low-rank matrix.

    y = x W + D(x) (W * (A B)),    A: [in, r],  B: [r, out]

As `W` has a high rank, so has the update. `B` starts at zero, so a fresh adapter does not change
any output. `D` is dropout.

Huang et al. 2025, "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language
Models", section 3 (ICLR 2025, openreview.net/forum?id=TwJrTz9cRS).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat


@dataclass(frozen=True, kw_only=True)
class HiRA(Targeted):
    """Hadamard product of a low-rank matrix with the kernel of linear sites.

    Leaves of a site: `hira_a [in, r]`, `hira_b [r, out]`, trained; `hira_dropout []` where the rate
    is not zero. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "hira"
    paper: ClassVar[str] = "https://openreview.net/forum?id=TwJrTz9cRS"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("hira_a", "hira_b", "hira_dropout"),
        trained=frozenset({"hira_a", "hira_b"}),
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={"hira_a": "hira_A", "hira_b": "hira_B"},
        type="HIRA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "hira_dropout": "dropout",
        },
        required=("r",),
        # PEFT 0.21 does not use them
        ignored=frozenset({"init_weights", "rank_pattern"}),
    )

    rank: int = option(32, "rank r of the matrix that multiplies the kernel", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of the update", at_least=0, below=1)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Make A uniform as in PEFT, and B zero."""
        del kernel
        n_in, n_out = site.shape
        leaves = {
            "hira_a": uniform(rng, (n_in, self.rank), n_in),
            "hira_b": jnp.zeros((self.rank, n_out), jnp.float32),
        }
        return leaves | (
            {"hira_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + D(x) (W * (A B))`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = drop_input(call, call.x.astype(y.dtype), "hira_dropout")
        return y + call.each(partial(multiply, partial(_update, call.kernel)), x)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + W * (A B)`."""
        kernel = base["kernel"]
        return {"kernel": kernel + _update(lambda: base.get("original", kernel), leaves)}


def _update(kernel: Kernel, leaves: Leaves) -> Any:
    return kernel() * product(leaves["hira_a"], leaves["hira_b"])
