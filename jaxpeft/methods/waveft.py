r"""WaveFT: an update of a frozen kernel with a few trained wavelet coefficients.

    y = x W + x U,    U' = s (R C_ll R' + G C_lh R' + R C_hl G' + G C_hh G'),
        C = [[C_ll, C_lh], [C_hl, C_hh]],    C[u_k, v_k] = c_k,    zero elsewhere

`R` and `G` are the reconstruction filters of a wavelet, low-pass `f` and high-pass `g`, with a
stride of 2: `R[2 i + a - l + 2, i] = f_a`, `a < l`. So every coefficient adds one patch of `l` by
`l` entries to `U'` `[out, in]`, its four filters given by the quadrant it is in. `C` is larger than
`U'` by `l - 2` rows and columns, and even. Without a wavelet, `U' = s C`. The coefficients are
drawn with a seed, the same for all kernels of one shape. Files contain only the seed, so the draw
must equal torch's. By default `c` starts at zero, so a fresh adapter does not change any output.

Bilican et al. 2025, "Exploring Sparsity for Parameter Efficient Fine Tuning Using Wavelets"
(arXiv:2505.12532). The filters are Daubechies', "Ten Lectures on Wavelets" (1992),
chapter 6: the spectral factor of least phase.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site, pattern_value, require_patterns
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.sparse import as_torch_draws, scatter
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

Wavelet = Literal["db1", "db2", "db3", "db4", "db5", "db6", "db7", "db8", "db9", "db10", "none"]
_RANDOM = 0.01
"""Standard deviation of coefficients that do not start at zero, as in PEFT."""


@dataclass(frozen=True)
class WaveFTFormat(TargetedFormat["WaveFT"]):
    """The file format of `WaveFT` adapters."""

    def write_options(self, method: WaveFT) -> dict[str, Any]:
        """Return the options; PEFT has a switch for no wavelet."""
        plain = method.wavelet == "none"
        return super().write_options(method) | {
            "wavelet_family": "db1" if plain else method.wavelet,
            "use_idwt": not plain,
        }

    def read_options(
        self, kind: type[WaveFT], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options."""
        values, problems = super().read_options(kind, config)
        if config.get("use_idwt") is False:
            values["wavelet"] = "none"
        return values, problems


@dataclass(frozen=True, kw_only=True)
class WaveFT(Biased):
    """Trained wavelet coefficients of the update of linear sites.

    Leaves of a site: `waveft_spectrum [n]`, float32, trained; `waveft_indices [2, n]`, int32, rows
    of which are coefficients along the outputs and along the inputs; `waveft_scale []`; with a
    wavelet, `waveft_filter [l]`, its low-pass filter.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "waveft"
    paper: ClassVar[str] = "arXiv:2505.12532"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("waveft_spectrum", "waveft_indices", "waveft_scale", "waveft_filter"),
        trained=frozenset({"waveft_spectrum"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
        pads=False,
    )
    peft: ClassVar[PeftFormat[Any]] = WaveFTFormat(
        tensors={"waveft_spectrum": "waveft_spectrum"},
        type="WAVEFT",
        options={
            **TARGET_OPTIONS,
            "n_frequency": "coefficients",
            "n_frequency_pattern": "coefficients_pattern",
            "scaling": "scaling",
            "wavelet_family": "wavelet",
            "random_loc_seed": "location_seed",
            "bias": "bias",
        },
        required=("n_frequency", "scaling", "wavelet_family", "random_loc_seed"),
        ignored=frozenset({"init_weights", "use_idwt"}),
    )

    coefficients: int = option(2592, "number n of trained coefficients per kernel", at_least=1)
    coefficients_pattern: dict[str, int] = option(
        {}, "other numbers, by suffix of a site's name", at_least=1
    )
    scaling: float = option(25.0, "factor s of the update", above=0)
    wavelet: Wavelet = option(
        "db1", "wavelet by Daubechies with this number of vanishing moments, or 'none'"
    )
    location_seed: int = option(777, "seed for drawing the coefficients", at_least=0, below=2**32)
    init_weights: Literal["zeros", "gaussian"] = option(
        "zeros", "initialization of c; 'gaussian' changes the initial outputs"
    )
    bias: Literal["none", "all", "waveft_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return self.init_weights == "zeros"

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        return super().expressions(whole) | {"coefficients_pattern": self.coefficients_pattern}

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if a pattern matches no adapted site.

        Raises:
            TargetError: A pattern is invalid; it names it.
        """
        require_patterns("coefficients_pattern", self.coefficients_pattern, names)

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Draw the coefficients with the seed, and initialize `c` according to `init_weights`.

        Raises:
            ConfigError: The kernel of the site has fewer entries.
        """
        del kernel
        n_in, n_out = site.shape
        count = pattern_value(site.name, self.coefficients_pattern, self.coefficients)
        if count > n_in * n_out:
            raise ConfigError(
                f"waveft.coefficients: {count} is more than the {n_in * n_out} of the kernel of"
                f" {site.name}; set a lower number in coefficients_pattern"
            )
        flat = as_torch_draws(count, n_in * n_out, self.location_seed)
        drawn = _RANDOM * jax.random.normal(rng, (count,), jnp.float32)
        leaves = {
            "waveft_spectrum": jnp.zeros_like(drawn) if self.init_weights == "zeros" else drawn,
            "waveft_indices": jnp.asarray(np.stack([flat // n_in, flat % n_in]), jnp.int32),
            "waveft_scale": jnp.asarray(self.scaling, jnp.float32),
        }
        if self.wavelet == "none":
            return leaves
        moments = int(self.wavelet.removeprefix("db"))
        return leaves | {"waveft_filter": jnp.asarray(daubechies(moments), jnp.float32)}

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + x U`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        return y + call.each(
            partial(multiply, partial(_update, (call.x.shape[-1], y.shape[-1]))),
            call.x.astype(y.dtype),
        )

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + U`."""
        return {"kernel": base["kernel"] + _update(base["kernel"].shape, leaves)}


def _update(shape: tuple[int, int], leaves: Leaves) -> Any:
    """Return `U` `[in, out]`."""
    indices, values = leaves["waveft_indices"], leaves["waveft_scale"] * leaves["waveft_spectrum"]
    if "waveft_filter" not in leaves:
        return scatter(indices, values, shape)
    low = leaves["waveft_filter"]
    (rows, high_row), (columns, high_column) = (
        _places(index, n, low.shape[0])
        for index, n in zip(indices, (shape[1], shape[0]), strict=True)
    )
    high = low[::-1] * (1 - 2 * (jnp.arange(low.shape[0]) % 2)).astype(low.dtype)
    # PEFT takes the upper right quadrant for details along the outputs, and the lower left one for
    # those along the inputs
    of_out, of_in = (jnp.where(which[:, None], high, low) for which in (high_column, high_row))
    patches = values[:, None, None] * of_in[:, :, None] * of_out[:, None, :]
    return (
        jnp.zeros(shape, jnp.float32)
        .at[columns[:, :, None], rows[:, None, :]]
        .add(patches, mode="drop")
    )


def _places(index: Any, size: int, length: int) -> tuple[Any, Any]:
    """Return where the filter of each coefficient is along one axis of the kernel.

    Args:
        index: `[n]`, indices of coefficients before padding.
        size: number of entries of the kernel along this axis.
        length: length of the filter.

    Returns:
        `[n, length]`, entries of the kernel, those outside of it at `size`; and `[n]`, whether a
        coefficient is in the upper half, that of the high-pass filter.
    """
    padded = size + length - 2
    half = (padded + 1) // 2
    index = index + (2 * half - size) // 2
    places = 2 * (index % half)[:, None] + jnp.arange(length) - (length - 2)
    return jnp.where((places >= 0) & (places < size), places, size), index >= half


@functools.cache
def daubechies(moments: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the low-pass reconstruction filter with this number of vanishing moments.

    Factors `f(z) = (1 + z)^N q(z)`, `|q|^2 = sum_k binomial(N - 1 + k, k) y^k`, `k < N`,
    `y = (2 - z - 1 / z) / 4`, with the roots of `q` inside of the unit circle, and scales it to the
    sum sqrt(2).

    Args:
        moments: N, from 1 to 10.

    Returns:
        `[2 N]` float64.
    """
    powers = [math.comb(moments - 1 + k, k) for k in range(moments)]
    found = np.ones(1)
    for y in np.roots(powers[::-1]):
        z = np.roots([1.0, 4.0 * y - 2.0, 1.0])
        found = np.convolve(found, [1.0, -z[np.argmin(np.abs(z))]])
    for _ in range(moments):
        found = np.convolve(found, [1.0, 1.0])
    return np.real(found) * math.sqrt(2) / np.real(found).sum()
