r"""Bottleneck adapters: a small network after each sub-layer, or parallel to it.

    A(z) = D(s (act(z W_down + b_down) W_up + b_up)),    W_down: [d, b],    W_up: [b, d],
        b = d / reduction_factor

What `z` is, and where `A(z)` is added, `placement` says: see `jaxpeft.methods.bottleneck`. `D` is
dropout. `scaling` is a number, one that is trained, or one that is trained for each of the d
channels; those begin at one. He et al. 2021 take 4.

`W_up` and the biases start at zero, so a fresh adapter does not change any output; with
`init_weights` `bert` or `houlsby` both matrices are random and small, and it nearly does.

The leaves stand beside the kernel of the linear module that gives a sub-layer's output. One that
does not say where its output joins the residual stream, as another's `nn.Dense`, can be adapted in
`houlsby`'s place only.

Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2 (arXiv:1902.00751).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.bottleneck import (
    Bottleneck,
    BottleneckFormat,
    add_to_output,
    bottleneck,
    join_residual,
    leaf_names,
)

_INITS = {"lora": "mam_adapter", "bert": "bert", "houlsby": "houlsby"}


_LEAVES = leaf_names("adapter", "down", "down_bias", "up", "up_bias")


@dataclass(frozen=True)
class AdapterFormat(BottleneckFormat["Adapter"]):
    """The file format of `Adapter` adapters."""

    def write_options(self, method: Adapter) -> dict[str, Any]:
        """Return the options in the format of the adapters library."""
        return super().write_options(method) | {"init_weights": _INITS[method.init_weights]}

    def read_options(
        self, kind: type[Adapter], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options of the adapters library."""
        values, problems = super().read_options(kind, config)
        begun = next(
            (
                ours
                for ours, theirs in _INITS.items()
                if theirs == config.get("init_weights", "bert")
            ),
            "lora",
        )
        return values | {"init_weights": begun}, problems


@dataclass(frozen=True, kw_only=True)
class Adapter(Bottleneck):
    """Bottleneck adapters after sub-layers, or parallel to them.

    Leaves of a site: `adapter_down [d, b]`, `adapter_down_bias [b]`, `adapter_up [b, d]`,
    `adapter_up_bias [d]`, trained; `adapter_scale []`, or `adapter_gain [1 or d]` that is trained;
    `adapter_dropout []` if the rate is not zero; and two scalars whose names say the placement
    and the non-linearity, as in `adapter_pfeiffer` and `adapter_relu`. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "arXiv:1902.00751"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset(
            {"adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias", "adapter_gain"}
        ),
    )
    peft: ClassVar[PeftFormat[Any]] = Bottleneck.peft.replace(
        AdapterFormat,
        tensors={
            "adapter_down": "adapter_down.0.weight",
            "adapter_down_bias": "adapter_down.0.bias",
            "adapter_up": "adapter_up.weight",
            "adapter_up_bias": "adapter_up.bias",
            "adapter_gain": "scaling",
        },
    )

    init_weights: Literal["lora", "bert", "houlsby"] = option(
        "lora", "initialization of the matrices; 'lora' sets W_up to zero"
    )

    @property
    def fresh_is_base(self) -> bool:
        """Whether a fresh adapter leaves every output bit-identical."""
        return self.init_weights == "lora"

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize the matrices according to `init_weights`, and the biases to zero."""
        del kernel
        d, b, keys = site.shape[1], self.width(site), jax.random.split(rng)
        if self.init_weights == "lora":
            down, up = (
                jax.random.uniform(keys[0], (d, b), minval=-1, maxval=1) / math.sqrt(d),
                jnp.zeros((b, d)),
            )
        elif self.init_weights == "bert":
            down, up = (
                0.02 * jax.random.normal(keys[0], (d, b)),
                0.02 * jax.random.normal(keys[1], (b, d)),
            )
        else:
            down = 0.01 * jax.random.truncated_normal(keys[0], -2, 2, (d, b))
            up = 0.01 * jax.random.truncated_normal(keys[1], -2, 2, (b, d))
        return self.site_leaves(
            site, {"down": down, "down_bias": jnp.zeros((b,)), "up": up, "up_bias": jnp.zeros((d,))}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `N(x + h + A(z))`, `[..., d]`, in the dtype of `h`."""
        return join_residual(call, "adapter", _network)

    @staticmethod
    def compute_alone(call: Call) -> Any:
        """Compute `h + A(h)`, `[..., in] -> [..., d]`."""
        return add_to_output(call, "adapter", _network)


def _network(leaves: Leaves, z: Any) -> Any:
    """Return `A(z)` without dropout, `[..., d] -> [..., d]`."""
    return bottleneck(leaves, "adapter", z, leaves["adapter_down"], leaves["adapter_up"])
