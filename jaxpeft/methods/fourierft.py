r"""FourierFT: an update of a frozen kernel with a few trained frequencies.

    y = x W + x U,    U' = s Re(ifft2(F)),    F[u_k, v_k] = c_k,    zero elsewhere,    F: [out, in],
        c: [n]

The frequencies are drawn with a seed, the same for all kernels of one shape. Files contain only the
seed, so the draw must equal torch's. By default `c` starts at zero, so a fresh
adapter does not change any output.

Gao et al. 2024, "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", section 3
(arXiv:2405.03003).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site, pattern_value, require_ends
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.sparse import as_torch_draws, scatter
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    from jax import Array


@dataclass(frozen=True, kw_only=True)
class FourierFT(Biased):
    """Trained frequencies of the update of linear sites.

    Leaves of a site: `fourierft_spectrum [n]`, float32, trained; `fourierft_indices [2, n]`, int32,
    rows of which are frequencies along the outputs and along the inputs; `fourierft_scale []`.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "fourierft"
    paper: ClassVar[str] = "arXiv:2405.03003"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("fourierft_spectrum", "fourierft_indices", "fourierft_scale"),
        trained=frozenset({"fourierft_spectrum"}),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
        pads=False,
    )
    peft: ClassVar[PeftFormat[Any]] = TargetedFormat(
        tensors={"fourierft_spectrum": "fourierft_spectrum"},
        type="FOURIERFT",
        options={
            **TARGET_OPTIONS,
            "n_frequency": "frequencies",
            "n_frequency_pattern": "frequencies_pattern",
            "scaling": "scaling",
            "random_loc_seed": "location_seed",
            "bias": "bias",
        },
        required=("n_frequency", "scaling", "random_loc_seed"),
        ignored=frozenset({"init_weights"}),
    )

    frequencies: int = option(1000, "number n of trained frequencies per kernel", at_least=1)
    frequencies_pattern: dict[str, int] = option(
        {}, "other numbers, by suffix of a site's name", at_least=1
    )
    scaling: float = option(150.0, "factor s of the update", above=0)
    location_seed: int = option(777, "seed for drawing the frequencies", at_least=0, below=2**32)
    init_weights: Literal["zeros", "gaussian"] = option(
        "zeros", "initialization of c; 'gaussian', PEFT's default, changes the initial outputs"
    )
    bias: Literal["none", "all", "fourier_only"] = bias_option()

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return self.init_weights == "zeros"

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        return super().expressions(whole) | {"frequencies_pattern": self.frequencies_pattern}

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if a pattern matches no site, or PEFT interprets it differently.

        Raises:
            TargetError: A pattern is invalid; it names it.
        """
        require_ends("frequencies_pattern", self.frequencies_pattern, names)

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Draw the frequencies with the seed, and initialize `c` according to `init_weights`.

        Raises:
            ConfigError: The kernel of the site has fewer frequencies.
        """
        del kernel
        (n_in, n_out), count = (
            site.shape,
            pattern_value(site.name, self.frequencies_pattern, self.frequencies),
        )
        if count > n_in * n_out:
            raise ConfigError(
                f"fourierft.frequencies: {count} is more than the {n_in * n_out} of the kernel of"
                f" {site.name}; set a lower number in frequencies_pattern"
            )
        flat = as_torch_draws(count, n_in * n_out, self.location_seed)
        zeros = self.init_weights == "zeros"
        return {
            "fourierft_spectrum": (
                jnp.zeros((count,), jnp.float32) if zeros else jax.random.normal(rng, (count,))
            ),
            "fourierft_indices": jnp.asarray(np.stack([flat // n_in, flat % n_in]), jnp.int32),
            "fourierft_scale": jnp.asarray(self.scaling, jnp.float32),
        }

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
    """Return `U` `[in, out]`: the transform of the transpose is the transpose of the transform."""
    spectrum = scatter(leaves["fourierft_indices"], leaves["fourierft_spectrum"], shape)
    return leaves["fourierft_scale"] * jnp.fft.ifft2(spectrum).real
