r"""RoAd: the outputs of a linear module are rotated and rescaled in pairs.

    y = R (x W + b),    of a pair:    y1 = c1 z1 - s1 z2,    y2 = c2 z2 + s2 z1,
        c = alpha cos(theta),    s = alpha sin(theta)

Within each group of outputs the first half is paired with the second, element by element. `road_1`
has one angle and one scale a pair, so that `c1 = c2` and `s1 = s2`; `road_2` has one of each an
output; `road_4` has others for `c` than for `s` as well. `theta` starts at zero and `alpha` at one,
so a fresh adapter does not change any output. The shapes of a site's leaves say which of the three
it computes.

Liao and Monz 2024, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and
Composability", section 3.2, equations 3 and 4, table 1 (arXiv:2409.00119).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jnp
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    import jax

_ROWS = {"road_1": 1, "road_2": 2, "road_4": 4}


_LEAVES = ("road_theta", "road_alpha")


@dataclass(frozen=True)
class RoAdFormat(TargetedFormat["RoAd"]):
    """The file format of `RoAd` adapters."""

    def pack(self, method: RoAd, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return angles and scales as one row each."""
        return {name: leaf.reshape(-1) for name, leaf in super().pack(method, site, leaves).items()}

    def unpack(self, method: RoAd, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return angles and scales by groups."""
        return {name: tensors[name].reshape(leaf.shape) for name, leaf in fresh.items()}


@dataclass(frozen=True, kw_only=True)
class RoAd(Targeted):
    """Rotation of the outputs of linear sites.

    Leaves of a site: `road_theta`, radians, and `road_alpha`,
    `[out / group_size, k, group_size / 2]` with k = 1, 2 or 4 as the variant says; float32,
    trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "road"
    paper: ClassVar[str] = "arXiv:2409.00119"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=_LEAVES,
        trained=frozenset(_LEAVES),
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = RoAdFormat(
        tensors={name: name for name in _LEAVES},
        type="ROAD",
        options={
            "target_modules": "targets",
            "variant": "variant",
            "group_size": "group_size",
        },
        required=("variant", "group_size"),
        ignored=frozenset({"init_weights"}),
    )

    variant: Literal["road_1", "road_2", "road_4"] = option(
        "road_1", "number of angles and scales per pair: 1, 2 or 4"
    )
    group_size: int = option(
        64, "number of outputs per group, which must divide the outputs of each site", at_least=2
    )

    def problems(self) -> list[str]:
        """List incompatible options: the group size must be even."""
        odd = [f"group_size: is {self.group_size}; must be even"] if self.group_size % 2 else []
        return super().problems() + odd

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize angles to zero and scales to one.

        Raises:
            ConfigError: The group size does not divide the outputs of the site.
        """
        del kernel, rng
        groups, rest = divmod(site.shape[1], self.group_size)
        if rest:
            raise ConfigError(
                f"road.group_size: {self.group_size} does not divide the {site.shape[1]} outputs of"
                f" {site.name}; use a divisor, or exclude the site"
            )
        shape = (groups, _ROWS[self.variant], self.group_size // 2)
        return {
            "road_theta": jnp.zeros(shape, jnp.float32),
            "road_alpha": jnp.ones(shape, jnp.float32),
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Rotate the output of the site, `[..., in] -> [..., out]`."""
        return call.each(_rotate, call.base(*call.args))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W R'` and `R b`."""
        return {name: _rotate(leaves, base[name]) for name in ("kernel", "bias") if name in base}


def _rotate(leaves: Leaves, z: Any) -> Any:
    """Return `R z` of `z` `[..., out]`, in its dtype."""
    theta, alpha = leaves["road_theta"], leaves["road_alpha"]
    groups, rows, half = theta.shape
    of_c, of_s = (
        (slice(0, 2), slice(2, 4)) if rows == _ROWS["road_4"] else (slice(None), slice(None))
    )
    c = (alpha[:, of_c] * jnp.cos(theta[:, of_c])).astype(z.dtype)
    s = (alpha[:, of_s] * jnp.sin(theta[:, of_s])).astype(z.dtype)
    pairs = z.reshape(*z.shape[:-1], groups, 2, half)
    turned = jnp.stack([-pairs[..., 1, :], pairs[..., 0, :]], axis=-2)
    return (pairs * c + turned * s).reshape(z.shape)
