r"""C3A: an update of circulant blocks, each defined by one vector.

    y_m = (x W)_m + 1 / in sum_n x_n C(w_mn),    C(w)[i, j] = w[(i - j) mod k],
        w: [out / k, in / k, k]

`x_n` and `y_m` are blocks of `k` inputs and outputs. The product with `C(w)` is a circular
correlation, elementwise where both are Fourier transformed: `k log k` work in place of `k^2`, and a
rank that the number of trained numbers does not bound. `w` starts at zero unless asked otherwise,
so a fresh adapter does not change any output.

Chen et al. 2025, "Parameter-Efficient Fine-Tuning via Circular Convolution", section 3
(arXiv:2407.19342).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site, pattern_value, require_ends
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.targeted import TargetedFormat, require_divisor

if TYPE_CHECKING:
    from jax import Array


_LEAVES = ("c3a_kernel",)


@dataclass(frozen=True, kw_only=True)
class C3A(Biased):
    """Block-circular convolution of the inputs of linear sites.

    Leaves of a site: `c3a_kernel [out / k, in / k, k]`, float32, trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "c3a"
    paper: ClassVar[str] = "arXiv:2407.19342"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset(_LEAVES),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
        pads=False,
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={"c3a_kernel": "c3a_kernel"},
        type="C3A",
        options={
            "target_modules": "targets",
            "layers_to_transform": "layers_to_transform",
            "layers_pattern": "layers_pattern",
            "block_size": "block_size",
            "block_size_pattern": "block_size_pattern",
            "bias": "bias",
        },
        required=("block_size",),
        ignored=frozenset({"init_weights"}),
    )

    block_size: int = option(
        256, "size k of the blocks, which must divide inputs and outputs of each site", at_least=1
    )
    block_size_pattern: dict[str, int] = option(
        {}, "other block sizes, by suffix of a site's name", at_least=1
    )
    init_weights: Literal["zeros", "xavier_uniform", "kaiming_uniform", "gaussian"] = option(
        "zeros",
        "initialization of w; all except 'zeros', including PEFT's default, change the initial"
        " outputs",
    )
    bias: Literal["none", "all", "c3a_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return self.init_weights == "zeros"

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        return super().expressions(whole) | {"block_size_pattern": self.block_size_pattern}

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if a pattern matches no site, or PEFT interprets it differently.

        Raises:
            TargetError: A pattern is invalid; it names it.
        """
        require_ends("block_size_pattern", self.block_size_pattern, names)

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize `w` according to `init_weights`.

        Raises:
            ConfigError: The block size does not divide the inputs and outputs of the site.
        """
        del kernel
        (n_in, n_out), size = (
            site.shape,
            pattern_value(site.name, self.block_size_pattern, self.block_size),
        )
        require_divisor("c3a.block_size", size, site)
        shape = (n_out // size, n_in // size, size)
        bounds = {
            "xavier_uniform": math.sqrt(6 / (n_in + n_out)),
            "kaiming_uniform": 1 / math.sqrt(n_in),
        }
        if self.init_weights == "zeros":
            return {"c3a_kernel": jnp.zeros(shape, jnp.float32)}
        if self.init_weights == "gaussian":
            return {"c3a_kernel": jax.random.normal(rng, shape, jnp.float32)}
        bound = bounds[self.init_weights]
        return {"c3a_kernel": jax.random.uniform(rng, shape, jnp.float32, -bound, bound)}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + x C / in`, `[..., in] -> [..., out]`, in the dtype of `x W`; the
        transforms are of float32.
        """
        y = call.base(*call.args)
        return y + call.each(_correlate, call.x.astype(jnp.float32)).astype(y.dtype)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + C / in`."""
        w = leaves["c3a_kernel"]
        places = jnp.arange(w.shape[2])
        blocks = w[
            :, :, (places[:, None] - places[None, :]) % w.shape[2]
        ]  # [out / k, in / k, k of in, k of out]
        n_in, n_out = base["kernel"].shape
        return {"kernel": base["kernel"] + blocks.transpose(1, 2, 0, 3).reshape(n_in, n_out) / n_in}


def _correlate(leaves: Leaves, x: Any) -> Any:
    """Return `x C / in` of `x` `[..., in]` float32."""
    w = leaves["c3a_kernel"]
    blocks = jnp.fft.rfft(x.reshape(*x.shape[:-1], *w.shape[1:]))
    mixed = jnp.einsum("...nf,mnf->...mf", blocks, jnp.conj(jnp.fft.rfft(w)), precision="highest")
    return jnp.fft.irfft(mixed, w.shape[2]).reshape(*x.shape[:-1], -1) / x.shape[-1]
