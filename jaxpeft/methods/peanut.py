r"""PEANuT: an update that a small network computes from the frozen kernel.

    y = x W + s x (H_2k B),    H_0 = f(W A),
        H_i = f(H_(i-1) E_i),  0 < i <= k,    H_(k+i) = f(H_(k+i-1) D_i) + H_(k-i),
        A: [out, r],  E, D: [r, r],  B: [r, out]

`f` is the activation and `k` the depth, the number of layers of encoder and decoder each; by
default there are none, and the update is `f(W A) B`. `B` starts at zero and the others uniform, so
a fresh adapter does not change any output.

Zhong et al. 2024, "PEANuT: Parameter-Efficient Adaptation with Weight-aware Neural Tweakers"
(arXiv:2410.01870); the residual connections are those of its code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, get_args

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.bottleneck import NonLinearity
from jaxpeft.methods.loha import uniform
from jaxpeft.methods.low_rank import product
from jaxpeft.methods.recomputed import multiply
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat

if TYPE_CHECKING:
    from jax import Array

_TRAINED = ("peanut_a", "peanut_b", "peanut_encoders", "peanut_decoders")
_STACKS: Mapping[str, str] = {name: name for name in _TRAINED[2:]}


@dataclass(frozen=True)
class PEANuTFormat(TargetedFormat["PEANuT"]):
    """The file format of `PEANuT` adapters, which stores the layers of the network separately."""

    def pack(self, method: PEANuT, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the matrices of all layers."""
        return super().pack(method, site, leaves) | {
            f"{name}.{i}.weight": leaves[name][i].T
            for name in _STACKS
            if name in leaves
            for i in range(leaves[name].shape[0])
        }

    def unpack(self, method: PEANuT, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the matrices with a leading axis of layers."""
        stacks = {
            name: jnp.stack([tensors[f"{name}.{i}.weight"].T for i in range(method.depth)])
            for name in _STACKS
            if name in fresh
        }
        return super().unpack(method, site, tensors, fresh) | stacks


@dataclass(frozen=True, kw_only=True)
class PEANuT(Targeted):
    """Updates of linear sites, computed from their kernels.

    Leaves of a site: `peanut_a [out, r]`, `peanut_b [r, out]`, and with a depth `peanut_encoders`
    and `peanut_decoders` `[depth, r, r]`, trained; `peanut_scale []`, and `peanut_NAME []` for the
    activation, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "peanut"
    paper: ClassVar[str] = "arXiv:2410.01870"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(*_TRAINED, "peanut_scale", *(f"peanut_{key}" for key in get_args(NonLinearity))),
        trained=frozenset(_TRAINED),
        # without the leaf of an activation the update is not computed
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = PEANuTFormat(
        tensors={"peanut_a": "peanut_A.weight", "peanut_b": "peanut_B.weight"},
        type="PEANUT",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "depth": "depth",
            "act_fn": "activation",
            "scaling": "scaling",
        },
        required=("r", "act_fn", "scaling"),
        ignored=frozenset({"init_weights"}),
    )

    rank: int = option(32, "width r of the network", at_least=1)
    depth: int = option(
        0, "number k of layers in the encoder and in the decoder", at_least=0, at_most=1000
    )
    activation: NonLinearity = option("relu", "activation f of the network")
    scaling: float = option(1.0, "factor s of the update", above=0)

    def init(self, site: Site, kernel: Kernel, rng: Array) -> dict[str, Array]:
        """Initialize B to zeros and the other matrices to uniform values, as PEFT does."""
        del kernel
        n_out, rank = site.shape[1], self.rank
        keys = jax.random.split(rng, 3)
        leaves = {
            "peanut_a": uniform(keys[0], (n_out, rank), n_out),
            "peanut_b": jnp.zeros((rank, n_out), jnp.float32),
            "peanut_scale": jnp.asarray(self.scaling, jnp.float32),
            f"peanut_{self.activation}": jnp.ones((), jnp.float32),
        }
        layers = {
            name: uniform(key, (self.depth, rank, rank), rank)
            for name, key in zip(_STACKS, keys[1:], strict=True)
        }
        return leaves | (layers if self.depth else {})

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + s (x H) B`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)

        def update(leaves: Leaves, x: Any) -> Any:
            h = multiply(partial(_hidden, call.kernel), leaves, x)
            return h @ (leaves["peanut_scale"] * leaves["peanut_b"]).astype(x.dtype)

        return y + call.each(update, call.x.astype(y.dtype))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s H B`."""
        kernel = base["kernel"]
        hidden = _hidden(lambda: base.get("original", kernel), leaves)
        return {"kernel": kernel + leaves["peanut_scale"] * product(hidden, leaves["peanut_b"])}


def _hidden(kernel: Kernel, leaves: Leaves) -> Any:
    """Return the network's last hidden layer `H`, `[in, r]` float32."""
    from jaxpeft.models.activations import ACTIVATIONS

    act = next(ACTIVATIONS[key] for key in get_args(NonLinearity) if f"peanut_{key}" in leaves)
    h = act(product(kernel(), leaves["peanut_a"]))
    skipped: list[Any] = []
    for matrix in leaves.get("peanut_encoders", ()):
        skipped.append(h)
        h = act(product(h, matrix))
    for matrix in leaves.get("peanut_decoders", ()):
        h = act(product(h, matrix)) + skipped.pop()
    return h
