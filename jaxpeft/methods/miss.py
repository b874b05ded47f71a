r"""MiSS: one small matrix shared by all shards of a frozen kernel.

    y = x W + (x1 + ... + xn) D,    x = [x1, ..., xn], shards of r inputs each,  D: [r, out]

The inputs are padded with zeros if r does not divide them. `variant` selects another form of
`D`:

* `mini`: `D` is `[r, mini_rank]`, repeated along the outputs;
* `bat`: the update of the shard of r inputs and r outputs `Wij` of the kernel depends on the shard,
  `Dj' Wij + Dj'`, with one `Dj: [r, r]` for each r outputs.

`D` starts at zero, so a fresh adapter does not change any output.

Kang and Yin 2024, "MiSS: Balancing LoRA Performance and Efficiency with Simple Shard Sharing",
section 3 (arXiv:2409.15371).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array


@dataclass(frozen=True)
class MiSSFormat(TargetedFormat["MiSS"]):
    """The file format of `MiSS` adapters."""

    def write_options(self, method: MiSS) -> dict[str, Any]:
        """Return the options; PEFT names the variant in `init_weights`."""
        return super().write_options(method) | {
            "init_weights": True if method.variant == "balance" else method.variant
        }

    def read_options(
        self, kind: type[MiSS], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read MiSS's options; an initialization that is not a variant means `balance`."""
        values, problems = super().read_options(kind, config)
        start = config.get("init_weights")
        return values | {"variant": start if isinstance(start, str) else "balance"}, problems


@dataclass(frozen=True, kw_only=True)
class MiSS(Biased):
    """Shard sharing at linear sites.

    Leaves of a site: `miss_block`, `[r, out]`, of `mini` `[r, mini_rank]`, of `bat`
    `[out / r, r, r]`, trained; `miss_dropout []` if the rate is not zero, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, options are incompatible, or the shards do not fit
            a site.
    """

    name: ClassVar[str] = "miss"
    paper: ClassVar[str] = "arXiv:2409.15371"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("miss_block", "miss_dropout"),
        trained=frozenset({"miss_block"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = MiSSFormat(
        tensors={"miss_block": "miss_block"},
        untransposed=frozenset({"miss_block"}),
        type="MISS",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "mini_r": "mini_rank",
            "miss_dropout": "dropout",
            "bias": "bias",
        },
        required=("r",),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(64, "size r of the shards", at_least=1)
    variant: Literal["balance", "mini", "bat"] = option("balance", "form of the shared matrix")
    mini_rank: int = option(1, "columns of the matrix of the variant 'mini'", at_least=1)
    dropout: float = option(0.0, "rate of dropout on the input of the update", at_least=0, below=1)
    bias: Literal["none", "all", "MiSS_only"] = bias_option()

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize the shared matrix to zeros.

        Raises:
            ConfigError: The shards do not fit the site.
        """
        del kernel, rng
        (n_in, n_out), rank = site.shape, self.rank
        shapes = {
            "balance": (rank, n_out),
            "mini": (rank, self.mini_rank),
            "bat": (n_out // rank, rank, rank),
        }
        fits = {
            "balance": True,
            "mini": n_out % self.mini_rank == 0,
            "bat": not (n_in % rank or n_out % rank),
        }
        if rank > n_in or not fits[self.variant]:
            shards = f"rank {rank}" + (
                f" and mini_rank {self.mini_rank}" if self.variant == "mini" else ""
            )
            raise ConfigError(
                f"miss: the kernel of {site.name}, {n_in} by {n_out}, is not divisible by {shards}"
            )
        leaves = {"miss_block": jnp.zeros(shapes[self.variant], jnp.float32)}
        return leaves | (
            {"miss_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W` and the update, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(call.x)
        x = drop_input(call, call.x.astype(y.dtype), "miss_dropout")
        bat = call.leaves["miss_block"].ndim - (call.rows is not None) == 3
        kernel, width = call.kernel() if bat else None, y.shape[-1]
        return y + call.each(
            lambda leaves, x: _update(leaves["miss_block"], x, kernel, width), x
        ).astype(y.dtype)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return the kernel with the update of each shard."""
        block, kernel = leaves["miss_block"], base["kernel"]
        if block.ndim == 3:
            return {"kernel": kernel + _bat(block, base.get("original", kernel))}
        n_in, n_out = kernel.shape
        whole = jnp.tile(block, (-(-n_in // block.shape[0]), n_out // block.shape[1]))
        return {"kernel": kernel + whole[:n_in]}


def _update(block: Any, x: Any, kernel: Any, width: int) -> Any:
    """Return the update of `x` `[..., in]`, `[..., width]`."""
    if kernel is not None:
        return x @ _bat(block, kernel).astype(x.dtype)
    rank, columns = block.shape
    x = jnp.pad(x, (*((0, 0),) * (x.ndim - 1), (0, -x.shape[-1] % rank)))
    update = jnp.sum(x.reshape(*x.shape[:-1], -1, rank), axis=-2) @ block.astype(x.dtype)
    return jnp.tile(update, width // columns)


def _bat(block: Any, kernel: Any) -> Any:
    """Return the update of a kernel `[in, out]`, shard by shard."""
    count, rank, _ = block.shape
    shards = kernel.reshape(-1, rank, count, rank)
    update = jnp.einsum("aibo,bij->ajbo", shards, block) + jnp.transpose(block, (2, 0, 1))
    return update.reshape(kernel.shape)
