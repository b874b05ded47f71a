r"""(IA)^3: elementwise rescaling of the outputs or inputs of modules.

    y = (x W + b) * l,    l: [1, out]       for keys and values
    y = (x * l') W + b,   l: [in, 1]        for the last module of a feed-forward layer

`l` starts at one, so a fresh adapter does not change any output. The shape of a
site's leaf says which of the two it computes.

Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context
Learning", section 3.3 (arXiv:2205.05638).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from jaxpeft.core.expressions import full_match, require_fast
from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import TargetError
from jaxpeft.lazy import jnp
from jaxpeft.methods.targeted import Targeted, TargetedFormat

if TYPE_CHECKING:
    import jax

_FEEDFORWARD = ("down_proj", "output.dense", "lin2", "fc2", "wo", "mlp.c_proj", "dense_4h_to_h")


@dataclass(frozen=True)
class IA3Format(TargetedFormat["IA3"]):
    """The file format of `IA3` adapters."""

    def write_options(self, method: IA3) -> dict[str, Any]:
        """Return the options; PEFT requires a list of feed-forward modules within the targets."""
        options = super().write_options(method)
        plain = isinstance(options["target_modules"], tuple) and set(method.feedforward) <= set(
            method.targets
        )
        if method.feedforward and not (plain and isinstance(method.feedforward, tuple)):
            options["feedforward_modules"] = method.feedforward_expression
        return options


@dataclass(frozen=True, kw_only=True)
class IA3(Targeted):
    """Rescaling of linear sites.

    Leaf of a site: `ia3_l`, `[in, 1]` where `feedforward` names it, `[1, out]` elsewhere; float32,
    trained.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "ia3"
    paper: ClassVar[str] = "arXiv:2205.05638"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("ia3_l",),
        trained=frozenset({"ia3_l"}),
        zero_is_base=False,
    )
    peft: ClassVar[PeftFormat[Any]] = IA3Format(
        tensors={"ia3_l": "ia3_l"},
        type="IA3",
        options={
            "target_modules": "targets",
            "exclude_modules": "exclude",
            "feedforward_modules": "feedforward",
        },
        required=("feedforward_modules",),
        ignored=frozenset({"init_ia3_weights", "fan_in_fan_out"}),
    )
    usual_targets: ClassVar[tuple[str, ...]] = (
        "k_proj",
        "v_proj",
        "key",
        "value",
        "k_lin",
        "v_lin",
        "key_proj",
        "value_proj",
        "k",
        "v",
        "c_attn",
        "query_key_value",
        "qkv_proj",
        *_FEEDFORWARD,
    )

    targets: str | tuple[str, ...] = option(
        "default",
        "list of name suffixes, a regular expression, 'all-linear', or 'default' for the method's"
        " default sites",
    )
    feedforward: str | tuple[str, ...] = option(
        "default",
        "names or regular expression of the sites whose input is rescaled; 'default' for the"
        " method's default",
    )

    def expressions(self, whole: bool) -> dict[str, Any]:
        """Return the options with regular expressions."""
        return super().expressions(whole) | {"feedforward": [self.feedforward]}

    @property
    def feedforward_expression(self) -> str:
        """The regular expression of the full names of the sites whose input is rescaled.

        As in PEFT, an entry of a list is a suffix of the name, not necessarily after a dot.
        """
        if isinstance(self.feedforward, str) and self.feedforward != "default":
            return self.feedforward
        ends = _FEEDFORWARD if self.feedforward == "default" else self.feedforward
        return f".*({'|'.join(map(re.escape, ends))})" if ends else r"(?!)"

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if `feedforward` matches no adapted site, or only some layers of a site.

        Raises:
            TargetError: It does; the message names the sites.
        """
        if isinstance(self.feedforward, str):
            require_fast("feedforward", {self.feedforward: self.feedforward_expression}, names)
        taken = [name for name in names if self.rescales_input(name)]
        if self.feedforward not in ("default", ()) and not taken:
            raise TargetError(
                f"feedforward: {self.feedforward!r} matches no adapted site, such as {names[0]}"
            )
        kinds = {_any_layer(name) for name in taken} & {
            _any_layer(name) for name in names if name not in taken
        }
        if kinds:
            raise TargetError(
                f"feedforward: matches only some layers of {min(kinds)}; select all or none"
            )

    def rescales_input(self, name: str) -> bool:
        """Return whether the input of the site, and not its output, is rescaled."""
        return full_match(self.feedforward_expression, name) is not None

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize `l` to ones."""
        del kernel, rng
        n_in, n_out = site.shape
        return {
            "ia3_l": jnp.ones(
                (n_in, 1) if self.rescales_input(site.name) else (1, n_out), jnp.float32
            )
        }

    @staticmethod
    def compute(call: Call) -> Any:
        """Rescale the input or the output of the site, `[..., in] -> [..., out]`."""
        if call.leaves["ia3_l"].shape[-2:] == (call.x.shape[-1], 1):
            return call.base(call.each(_rescale, call.x))
        return call.each(_rescale, call.base(call.x))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `l * W`, and `l * b` if the output is rescaled."""
        scale = leaves["ia3_l"]
        folded = {"kernel": scale * base["kernel"]}
        if "bias" in base and scale.shape != (base["kernel"].shape[0], 1):
            folded["bias"] = scale.reshape(-1) * base["bias"]
        return folded


def _rescale(leaves: Leaves, x: Any) -> Any:
    return x * leaves["ia3_l"].reshape(-1).astype(x.dtype)


def _any_layer(name: str) -> str:
    return re.sub(r"(^|\.)\d+\.", r"\1*.", name)
