r"""GraLoRA: the kernel is split into k times k blocks, each with its own low-rank update.

    y_j = (x W)_j + s sum_i D(x)_i A_i[:, j] B_j[i],    A: [k, in / k, r],    B: [k, r, out / k],
        i, j < k,    s = alpha / (r + h)

The `r` columns of `A_i` are split into k parts, of which output block `j` uses the `j`th, and so
are the rows of `B_j`: each block has rank `r / k`, and the full update up to `k r`, with as many
trainable parameters as LoRA of rank `r`. With a hybrid rank `h`, `s (D(x) A') B'` with
`A': [in, h]`, `B': [h, out]` is added. `B` and `B'` start at zero, so a fresh adapter does not
change any output. `D` is dropout.

Jung et al. 2025, "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning",
sections 3.2 and 3.4 (arXiv:2505.20355).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TargetedFormat, require_divisor

if TYPE_CHECKING:
    from jax import Array


_LEAVES = (
    "gralora_a",
    "gralora_b",
    "gralora_general_a",
    "gralora_general_b",
    "gralora_scale",
    "gralora_dropout",
)


@dataclass(frozen=True, kw_only=True)
class GraLoRA(Biased):
    """Granular low-rank adaptation of linear sites.

    Leaves of a site: `gralora_a [k, in / k, r]`, `gralora_b [k, r, out / k]`, and with a hybrid
    rank `gralora_general_a [in, h]`, `gralora_general_b [h, out]`, trained; `gralora_scale []`,
    `gralora_dropout []` if the rate is not zero. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "gralora"
    paper: ClassVar[str] = "arXiv:2505.20355"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset(_LEAVES[:4]),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(update=lambda shape, leaves: _low_rank_update(leaves))
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={
            "gralora_a": "gralora_A",
            "gralora_b": "gralora_B",
            "gralora_general_a": "gralora_A_general.weight",
            "gralora_general_b": "gralora_B_general.weight",
        },
        type="GRALORA",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "r": "rank",
            "hybrid_r": "hybrid_rank",
            "alpha": "alpha",
            "gralora_k": "blocks",
            "gralora_dropout": "dropout",
            "bias": "bias",
        },
        required=("r", "alpha", "gralora_k"),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(32, "rank r, a multiple of blocks", at_least=1)
    hybrid_rank: int = option(0, "rank h of an additional plain LoRA", at_least=0)
    alpha: float = option(64.0, "numerator of the scaling alpha / (rank + hybrid_rank)", above=0)
    blocks: int = option(2, "number k of blocks of the inputs and of the outputs", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    bias: Literal["none", "all", "gralora_only"] = bias_option()

    def problems(self) -> list[str]:
        """List incompatible options: the blocks must divide the rank."""
        rest = self.rank % self.blocks
        return super().problems() + (
            [f"rank: {self.rank} is not a multiple of blocks, {self.blocks}"]
            if self.blocks > 0 and rest
            else []
        )

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Make A and A' uniform as in PEFT, B and B' zero.

        Raises:
            ConfigError: The blocks do not divide the inputs and outputs of the site.
        """
        del kernel
        (n_in, n_out), k = site.shape, self.blocks
        require_divisor("gralora.blocks", k, site)
        keys = jax.random.split(rng)
        leaves = {
            "gralora_a": uniform(keys[0], (k, n_in // k, self.rank), n_in // k),
            "gralora_b": jnp.zeros((k, self.rank, n_out // k), jnp.float32),
            "gralora_scale": jnp.asarray(self.alpha / (self.rank + self.hybrid_rank), jnp.float32),
        }
        if self.hybrid_rank:
            leaves["gralora_general_a"] = uniform(keys[1], (n_in, self.hybrid_rank), n_in)
            leaves["gralora_general_b"] = jnp.zeros((self.hybrid_rank, n_out), jnp.float32)
        return leaves | (
            {"gralora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W` and the updates of its blocks, `[..., in] -> [..., out]`, in the dtype of
        `x W`.
        """
        y = call.base(*call.args)
        return y + call.each(_update, drop_input(call, call.x.astype(y.dtype), "gralora_dropout"))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return the kernel with the update of each block."""
        a, b = _by_blocks(leaves)
        blocks = jnp.einsum("iajs,jiso->iajo", a, b, precision="highest").reshape(
            base["kernel"].shape
        )
        general = (
            product(leaves["gralora_general_a"], leaves["gralora_general_b"])
            if _hybrid(leaves)
            else 0.0
        )
        return {"kernel": base["kernel"] + leaves["gralora_scale"] * (blocks + general)}


def _update(leaves: Leaves, x: Any) -> Any:
    a, b = _by_blocks(leaves)
    inputs = x.reshape(*x.shape[:-1], a.shape[0], a.shape[1])
    h = jnp.einsum("...ia,iajs->...jis", inputs, a.astype(x.dtype))
    y = jnp.einsum("...jis,jiso->...jo", h, (leaves["gralora_scale"] * b).astype(x.dtype)).reshape(
        *x.shape[:-1], -1
    )
    if _hybrid(leaves):
        return y + low_rank(
            x, leaves["gralora_general_a"], leaves["gralora_scale"] * leaves["gralora_general_b"]
        )
    return y


def _low_rank_update(leaves: Leaves) -> LowRank:
    """Return the update of a site with A and B of all blocks, of rank k r and the hybrid rank."""
    a, b = _by_blocks(leaves)
    one = jnp.eye(a.shape[0])
    # each block of inputs has its own columns of A, and each of outputs its own columns of B
    wide_a = jnp.einsum("iajs,im->iamjs", a, one).reshape(a.shape[0] * a.shape[1], -1)
    wide_b = jnp.einsum("jiso,jm->ijsmo", b, one).reshape(wide_a.shape[1], -1)
    if _hybrid(leaves):
        wide_a = jnp.concatenate([wide_a, leaves["gralora_general_a"]], axis=1)
        wide_b = jnp.concatenate([wide_b, leaves["gralora_general_b"]])
    return LowRank(wide_a, wide_b, leaves["gralora_scale"])


def _by_blocks(leaves: Leaves) -> tuple[Any, Any]:
    """Return A as `[i, in / k, j, r / k]` and B as `[j, i, r / k, out / k]`."""
    a, b = leaves["gralora_a"], leaves["gralora_b"]
    k = a.shape[0]
    return a.reshape(*a.shape[:2], k, -1), b.reshape(k, k, -1, b.shape[2])


def _hybrid(leaves: Leaves) -> bool:
    return "gralora_general_a" in leaves
