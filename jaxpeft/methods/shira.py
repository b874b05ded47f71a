r"""SHiRA: a few random entries of a frozen kernel are trained.

    y = x W + x S,    S[i_k, j_k] = w_k,    w: [n],  n = r (in + out)

The update is sparse and has a high rank, and as many trained numbers as LoRA of rank `r`. Which
entries it takes is drawn at random once, one of each of `n` parts of the kernel, and kept beside
`w`, in files as well. `w` starts at zero, so a fresh adapter does not change any output.

Bhardwaj et al. 2024, "Sparse High Rank Adapters", section 3, its mask SHiRA-Rand
(arXiv:2406.13175).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.sparse import draw_one_per_part, scatter
from jaxpeft.methods.targeted import Targeted, TargetedFormat

_LEAVES = ("shira_weight", "shira_indices")


@dataclass(frozen=True)
class SHiRAFormat(TargetedFormat["SHiRA"]):
    """The file format of `SHiRA` adapters."""

    def wrong_numbers(self, method: SHiRA, site: Site, tensors: Leaves) -> list[str]:
        """List indices outside of the kernel, which would be ignored, or not integers."""
        places, (n_in, n_out) = np.asarray(tensors["shira_indices"]), site.shape
        inside = (
            (places >= 0) & (places < np.array([[n_out], [n_in]])) & (places == np.floor(places))
        )
        why = f"shira_indices: has indices outside of the kernel, {n_out} outputs by {n_in} inputs"
        return [] if inside.all() else [why]


@dataclass(frozen=True, kw_only=True)
class SHiRA(Targeted):
    """A sparse update of linear sites.

    Leaves of a site: `shira_weight [n]`, float32, trained; `shira_indices [2, n]`, int32, rows of
    which are places in the outputs and in the inputs.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "shira"
    paper: ClassVar[str] = "arXiv:2406.13175"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset({"shira_weight"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = SHiRAFormat(
        tensors={name: name for name in _LEAVES},
        untransposed=frozenset({"shira_indices"}),
        type="SHIRA",
        options={"target_modules": "targets", "r": "rank"},
        required=("r",),
        ignored=frozenset({"init_weights", "mask_type", "random_seed"}),
    )

    rank: int = option(32, "rank r of a LoRA with as many trainable parameters", at_least=1)

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Draw the entries, and initialize `w` to zero.

        Raises:
            ConfigError: The kernel of the site has fewer entries.
        """
        del kernel
        (n_in, n_out), count = site.shape, self.rank * sum(site.shape)
        if count > n_in * n_out:
            raise ConfigError(
                f"shira.rank: {self.rank} needs {count} entries of the kernel of {site.name}, which"
                f" has {n_in * n_out}; set a lower rank, or exclude the site"
            )
        flat = draw_one_per_part(rng, count, n_in * n_out)
        indices = jnp.stack([flat // n_in, flat % n_in]).astype(jnp.int32)
        return {"shira_weight": jnp.zeros((count,), jnp.float32), "shira_indices": indices}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + x S`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        return y + call.each(
            partial(multiply, partial(_sparse, (call.x.shape[-1], y.shape[-1]))),
            call.x.astype(y.dtype),
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + S`."""
        return {"kernel": base["kernel"] + _sparse(base["kernel"].shape, leaves)}


def _sparse(shape: tuple[int, int], leaves: Leaves) -> Any:
    """Return `S` `[in, out]`; as in PEFT, duplicate entries are summed."""
    return scatter(leaves["shira_indices"], leaves["shira_weight"], shape)
