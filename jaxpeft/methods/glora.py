r"""GLoRA: kernel and bias are rescaled and shifted by matrices of a chosen form.

    y = x (W + W * A + B) + b + b * D + E + C W

`*` is the elementwise product. `A` and `B` `[in, out]` are low-rank products, one number for each
output, one number for all, or absent; `C` `[1, in]` is a low-rank product, a vector, or absent; `D`
and `E` `[out]` are vectors, single numbers, or absent. Modules without a bias have neither `C` nor
`D` and `E`. One factor of each product starts at zero, and so do vectors and numbers; a fresh
adapter does not change any output.

Chavan et al. 2023, "One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning"
(arXiv:2306.07967).
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
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.targeted import TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_MATRICES = ("a", "b", "c", "d", "e")
_PARTS: Mapping[str, str] = {"": "X", "_down": "Xd", "_up": "Xu"}
"""Maps what a matrix is, itself or one factor of it, to PEFT's name."""
_TENSORS = {
    f"glora_{key}{part}": f"glora_{key.upper()}.{name}"
    for key in _MATRICES
    for part, name in _PARTS.items()
}


@dataclass(frozen=True)
class GLoRAFormat(TargetedFormat["GLoRA"]):
    """The file format of `GLoRA` adapters, which stores absent matrices as zeros."""

    def pack(self, method: GLoRA, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the matrices, and zeros for absent ones."""
        n_in, n_out = site.shape
        shapes = {"A": (n_out, n_in), "B": (n_out, n_in), "C": (n_in, 1), "D": (n_out,)}
        shapes["E"] = shapes["D"]
        held = super().pack(method, site, leaves)
        there = {name.partition(".")[0] for name in held}
        return held | {
            f"glora_{key}.zeros": jnp.zeros(shape, jnp.float32)
            for key, shape in shapes.items()
            if f"glora_{key}" not in there
        }

    def wrong_numbers(self, method: GLoRA, site: Site, tensors: Leaves) -> list[str]:
        """List absent matrices that are not zero."""
        return [
            f"{name}: must be zero, since the options say that this matrix is absent"
            for name, tensor in tensors.items()
            if name.endswith(".zeros") and np.any(np.asarray(tensor))
        ]


@dataclass(frozen=True, kw_only=True)
class GLoRA(Biased):
    """Rescaled and shifted kernels and biases of linear sites.

    Leaves of a site, float32, trained: of a low-rank `A` (`B`, `C`) `glora_a_up [in, r]` and
    `glora_a_down [r, out]` (of `C` `[1, r]` and `[r, in]`); of others `glora_a`, `glora_b`
    `[1, out]` or `[1]`, `glora_c [1, in]`, `glora_d`, `glora_e` `[out]` or `[1]`. Any of them may
    be absent, so `glora_marker []`, not trained, marks the site.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "glora"
    paper: ClassVar[str] = "arXiv:2306.07967"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("glora_marker", *_TENSORS),
        trained=frozenset(_TENSORS),
        # zeros compute the base, but would not stay zero in training
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = GLoRAFormat(
        tensors=_TENSORS,
        type="GLORA",
        options={
            "target_modules": "targets",
            "r": "rank",
            "config_A_B": "kernel_form",
            "config_C": "coupling_form",
            "config_D_E": "bias_form",
            "bias": "bias",
        },
        required=("r", "config_A_B", "config_C", "config_D_E"),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(8, "rank r of low-rank matrices", at_least=1)
    kernel_form: Literal["lora", "vector", "constant", "none"] = option(
        "lora", "form of A and B: low-rank, one number per output, one number, or absent"
    )
    coupling_form: Literal["lora", "vector", "none"] = option(
        "lora", "form of C: low-rank, one number per input, or absent"
    )
    bias_form: Literal["vector", "constant", "none"] = option(
        "constant", "form of D and E: one number per output, one number, or absent"
    )
    bias: Literal["none", "all", "glora_only"] = bias_option()

    def problems(self) -> list[str]:
        """List incompatible options: one of the matrices must be trained."""
        forms = {self.kernel_form, self.coupling_form, self.bias_form}
        none = ["kernel_form: is none, as are the others; nothing would be trained"]
        return super().problems() + (none if forms == {"none"} else [])

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize one factor of each product to uniform values, all else to zeros."""
        del kernel
        n_in, n_out = site.shape
        forms = {
            "a": (self.kernel_form, n_in, n_out),
            "b": (self.kernel_form, n_in, n_out),
            "c": (self.coupling_form if site.bias else "none", 1, n_in),
            "d": (self.bias_form if site.bias else "none", 0, n_out),
            "e": (self.bias_form if site.bias else "none", 0, n_out),
        }
        leaves = {"glora_marker": jnp.ones((), jnp.float32)}
        for rng_of, (key, (form, rows, columns)) in zip(
            jax.random.split(rng, len(forms)), forms.items(), strict=True
        ):
            if form == "lora":
                leaves[f"glora_{key}_up"] = uniform(rng_of, (rows, self.rank), rows)
                leaves[f"glora_{key}_down"] = jnp.zeros((self.rank, columns), jnp.float32)
            elif form != "none":
                shape = (1,) if form == "constant" else (1, columns) if rows else (columns,)
                leaves[f"glora_{key}"] = jnp.zeros(shape, jnp.float32)
        return leaves

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + b` and the update, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)

        def update(leaves: Leaves, x: Any) -> Any:
            shift = _shift(leaves, call.kernel, call.bias)
            changed = multiply(partial(_change, call.kernel), leaves, x)
            return changed if shift is None else changed + shift.astype(x.dtype)

        return y + call.each(update, call.x.astype(y.dtype))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + W * A + B` and `b + b * D + E + C W`."""
        kernel = base.get("original", base["kernel"])
        changed = {"kernel": base["kernel"] + _change(lambda: kernel, leaves)}
        shift = _shift(leaves, lambda: kernel, base.get("bias"))
        return changed if shift is None else changed | {"bias": base["bias"] + shift}


def _matrix(leaves: Leaves, key: str) -> Any:
    """Return a matrix of a site, or None if it is absent."""
    if f"glora_{key}_up" in leaves:
        return product(leaves[f"glora_{key}_up"], leaves[f"glora_{key}_down"])
    return leaves.get(f"glora_{key}")


def _change(kernel: Kernel, leaves: Leaves) -> Any:
    """Return `W * A + B`, `[in, out]` or zero."""
    a, b = _matrix(leaves, "a"), _matrix(leaves, "b")
    return jnp.zeros_like(kernel()) if a is None or b is None else kernel() * a + b


def _shift(leaves: Leaves, kernel: Kernel, bias: Any) -> Any:
    """Return `b * D + E + C W`, `[out]`, or None if none of them exists."""
    c, d, e = (_matrix(leaves, key) for key in ("c", "d", "e"))
    parts = [product(c, kernel())[0]] if c is not None else []
    if d is not None and e is not None:
        parts.append(bias * d + e)
    return sum(parts) if parts else None
