r"""Super-Tuning: the entries of a frozen kernel that are largest, or smallest, are trained.

    y = x W + x S + s (D(x) A) B,    S[i_k, j_k] = w_k,    w: [n],  n = p in out,    s = alpha / r

The share `p` of entries is chosen once, and their places are kept beside `w`, in files as well. The
low-rank update `A B` is optional ("Supra"). `w` and `B` start at zero, so a fresh adapter does not
change any output. `D` is dropout.

PEFT may leave the places of the entries out of a file and choose them again. Equal entries, of
which a kernel in bfloat16 has many, then have no definite order. Here places are always written
out, and a file without them is refused.

The paper that PEFT names as its source: "Super-Tuning" (arXiv:2607.09287).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.sparse import scatter
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_TRAINED = ("supertuning_values", "supertuning_a", "supertuning_b")


@dataclass(frozen=True)
class SuperTuningFormat(TargetedFormat["SuperTuning"]):
    """The file format of `SuperTuning` adapters."""

    def write_options(self, method: SuperTuning) -> dict[str, Any]:
        """Return the options; PEFT names the share of the others, and its rank may be null."""
        ranked = {"r": method.rank, "lora_alpha": method.alpha} if method.rank else {}
        return super().write_options(method) | {
            "sparsity": 1 - method.share,
            "select_top": method.select == "largest",
            "save_precomputed_indices": True,
            "r": None,
            "lora_alpha": None,
            **ranked,
        }

    def read_options(
        self, kind: type[SuperTuning], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options; a file without its places is an error."""
        values, problems = super().read_options(kind, config)
        sparsity, rank = config.get("sparsity"), config.get("r")
        if isinstance(sparsity, (int, float)):
            values["share"] = 1 - sparsity
        values["select"] = "largest" if config.get("select_top", True) else "smallest"
        if rank is not None:
            values["rank"] = rank
        if not config.get("save_precomputed_indices", True):
            problems.append(
                "save_precomputed_indices: is false, so the file does not say which entries are"
                " trained; save the adapter in PEFT with save_precomputed_indices=True"
            )
        return values, problems

    def wrong_numbers(self, method: SuperTuning, site: Site, tensors: Leaves) -> list[str]:
        """List places outside of the kernel, which would be ignored, or not integers."""
        places, count = np.asarray(tensors["supertuning_indices"]), site.shape[0] * site.shape[1]
        inside = (places >= 0) & (places < count) & (places == np.floor(places))
        why = f"supertuning_indices: has places outside of the kernel, which has {count} entries"
        return [] if inside.all() else [why]


@dataclass(frozen=True, kw_only=True)
class SuperTuning(Targeted):
    """Trained entries of the kernels of linear sites, chosen by size.

    Leaves of a site: `supertuning_values [n]`, float32, trained; `supertuning_indices [n]`, int32,
    places in the kernel, output by output; with a rank `supertuning_a [in, r]`,
    `supertuning_b [r, out]`, trained, and `supertuning_scale []`, `supertuning_dropout []`, not
    trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "supertuning"
    paper: ClassVar[str] = "arXiv:2607.09287"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(*_TRAINED, "supertuning_indices", "supertuning_scale", "supertuning_dropout"),
        trained=frozenset(_TRAINED),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = SuperTuningFormat(
        tensors={
            "supertuning_values": "supertuning_values",
            "supertuning_indices": "supertuning_indices",
            "supertuning_a": "supertuning_lora_A.weight",
            "supertuning_b": "supertuning_lora_B.weight",
        },
        type="SUPERTUNING",
        options={
            "target_modules": "targets",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
        },
        required=("sparsity",),
        ignored=frozenset(
            {"init_weights", "sparsity", "select_top", "r", "save_precomputed_indices"}
        ),
    )

    share: float = option(
        0.01, "share of the entries of a kernel that are trained", above=0, at_most=1
    )
    select: Literal["largest", "smallest"] = option(
        "largest", "which entries are trained, by absolute value"
    )
    rank: int = option(0, "rank r of an additional low-rank update; 0 for none", at_least=0)
    alpha: float | None = option(
        None, "numerator of its scaling alpha / rank; None for 2 rank", above=0
    )
    dropout: float = option(
        0.0, "rate of dropout on the input of the low-rank update", at_least=0, below=1
    )

    def problems(self) -> list[str]:
        """List options of the low-rank update that are set without a rank."""
        unused = [name for name in ("alpha", "dropout") if getattr(self, name) and not self.rank]
        return super().problems() + [f"{name}: needs a rank" for name in unused]

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Choose the entries; initialize A to uniform values, all else to zeros.

        Raises:
            ConfigError: The share is less than one entry of the site.
        """
        (n_in, n_out), rank = site.shape, self.rank
        # rounded as in PEFT
        count = int(n_in * n_out * (1 - (1 - self.share)))
        if not count:
            raise ConfigError(
                f"supertuning.share: {self.share} of the {n_in * n_out} entries of the kernel of"
                f" {site.name} is less than one; set a larger share, or exclude the site"
            )
        sizes = jnp.abs(kernel().T).reshape(-1)
        _, places = jax.lax.top_k(sizes if self.select == "largest" else -sizes, count)
        leaves = {
            "supertuning_values": jnp.zeros((count,), jnp.float32),
            "supertuning_indices": places.astype(jnp.int32),
        }
        if not rank:
            return leaves
        alpha = 2 * rank if self.alpha is None else self.alpha
        leaves["supertuning_a"] = uniform(rng, (n_in, rank), n_in)
        leaves["supertuning_b"] = jnp.zeros((rank, n_out), jnp.float32)
        leaves["supertuning_scale"] = jnp.asarray(alpha / rank, jnp.float32)
        return leaves | (
            {"supertuning_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W` and the updates, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = call.x.astype(y.dtype)
        shape = (x.shape[-1], y.shape[-1])
        y = y + call.each(partial(multiply, partial(_sparse, shape)), x)
        if "supertuning_a" not in call.leaves:
            return y
        return y + call.each(_low_rank, drop_input(call, x, "supertuning_dropout"))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + S + s A B`."""
        kernel = base["kernel"] + _sparse(base["kernel"].shape, leaves)
        if "supertuning_a" not in leaves:
            return {"kernel": kernel}
        update = product(leaves["supertuning_a"], leaves["supertuning_b"])
        return {"kernel": kernel + leaves["supertuning_scale"] * update}


def _sparse(shape: tuple[int, int], leaves: Leaves) -> Any:
    """Return `S` `[in, out]`; as in PEFT, duplicate entries are summed."""
    places = leaves["supertuning_indices"]
    rows = jnp.stack([places // shape[0], places % shape[0]])
    return scatter(rows, leaves["supertuning_values"], shape)


def _low_rank(leaves: Leaves, x: Any) -> Any:
    b = leaves["supertuning_scale"] * leaves["supertuning_b"]
    return low_rank(x, leaves["supertuning_a"], b)
