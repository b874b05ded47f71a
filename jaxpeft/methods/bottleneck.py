"""What the bottleneck adapters have in common: where they stand, what is around their matrices, and
their files.

`h` is what a sub-layer gives, `x` what it was given, before its own norm, and `N` the norm behind
their sum: BERT's, and none in a decoder. Without an adapter `A` a layer goes on with `N(x + h)`;
with it, by `placement`, with

* `houlsby`: `N(x + h + A(h))`, behind attention and feed-forward (Houlsby et al. 2019, section 2.1,
  arXiv:1902.00751);
* `pfeiffer`: `N(x + h + A(N(x + h)))`, behind feed-forward (Pfeiffer et al. 2020, section 3.2,
  arXiv:2005.00247);
* `parallel`: `N(x + h + A(x))`, beside feed-forward (He et al. 2021, section 3.3,
  arXiv:2110.04366).

Files are those of the `adapters` library (Poth et al. 2023, arXiv:2311.11077).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from jaxpeft.core.method import Call, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.core.targets import Site, Targets, usual_targets
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat

ATTENTION = ("self_attn.o_proj", "attention.output.dense", "attention.out_lin")
FEED_FORWARD = ("mlp.down_proj", "output.dense", "ffn.lin2")
"""The ends of the names of the modules that write to the residual stream; BERT's second is an end
of its first, too.
"""

Placement = Literal["houlsby", "pfeiffer", "parallel"]
NonLinearity = Literal[
    "relu",
    "gelu",
    "gelu_new",
    "gelu_fast",
    "gelu_accurate",
    "gelu_pytorch_tanh",
    "quick_gelu",
    "silu",
    "swish",
    "tanh",
    "sigmoid",
    "leaky_relu",
    "mish",
    "relu6",
    "relu2",
    "laplace",
    "linear",
]
_USUAL = {"houlsby": "both", "pfeiffer": "feed_forward", "parallel": "feed_forward"}
_FORM = {
    "is_parallel": False,
    "original_ln_before": False,
    "original_ln_after": True,
    "residual_before_ln": True,
}
_FORMS = {
    "houlsby": _FORM,
    "pfeiffer": _FORM | {"original_ln_before": True},
    "parallel": _FORM | {"is_parallel": True},
}


def leaf_names(name: str, *own: str) -> tuple[str, ...]:
    """Return the names of all leaves of a method at a site.

    Args:
        name: of the method.
        *own: of the matrices and what belongs to them, without the method's name.
    """
    form = ("scale", "gain", "dropout", *get_args(Placement), *get_args(NonLinearity))
    return tuple(f"{name}_{key}" for key in (*own, *form))


def _joins(module: Any, name: str) -> bool:
    """Return whether a method is that where a module's output joins the residual stream; of a
    module without one, its output.
    """
    return name == "join" or not hasattr(module, "join")


M = TypeVar("M", bound="Bottleneck")


@dataclass(frozen=True)
class BottleneckFormat(TargetedFormat[M]):
    """How adapters of `Bottleneck` stand in files."""

    def reads(self, kind: type[M], config: Mapping[str, Any]) -> bool:
        """Return whether a config is of this method, by its own name or as a section of the
        adapters library.
        """
        section = (
            config.get("peft_type") == self.layout
            and bool(config.get("phm_layer")) == kind.factored
        )
        return section or super().reads(kind, config)

    def names(self, kind: type[M]) -> Mapping[str, str]:
        """Return the method's options by what the adapters library calls them."""
        return self.options

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options as the adapters library has them; the sites are told by the layout of
        its files.
        """
        return {
            key: value
            for key, value in super().write_options(method).items()
            if key not in TARGET_OPTIONS
        } | _FORMS[method.placement]

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options of the adapters library."""
        values, problems = super().read_options(kind, config)
        form = {key: config.get(key, absent) for key, absent in _FORM.items()}
        if form["is_parallel"] is True:
            form["original_ln_before"] = False  # it reads x, whatever that says
        if form["original_ln_before"] is False:
            form["residual_before_ln"] = True  # the same then
        placement = next((name for name, flags in _FORMS.items() if flags == form), None)
        on = (bool(config.get("mh_adapter")), bool(config.get("output_adapter")))
        sublayers = {
            (True, True): "both",
            (True, False): "attention",
            (False, True): "feed_forward",
        }.get(on)
        if placement is None:
            said = ", ".join(f"{key} {value!r}" for key, value in form.items())
            problems.append(f"{said}: together none of the placements {', '.join(_FORMS)}")
        if sublayers is None:
            problems.append("mh_adapter, output_adapter: neither is true, so there is no adapter")
        if placement is None or sublayers is None:
            return values, problems
        return (
            values
            | {
                "placement": placement,
                "sublayers": "default" if sublayers == _USUAL[placement] else sublayers,
            },
            problems,
        )


@dataclass(frozen=True, kw_only=True)
class Bottleneck(Targeted):
    """A method that puts a small network behind sub-layers, or beside them.

    Leaves of a site, beside the matrices: `scale []`, or `gain [1 or d]` that is trained; `dropout
    []` where the rate is not zero; and two scalars whose names say the placement and the
    non-linearity. All names begin with the method's.

    Class attributes:
        factored: whether the matrices are those of the adapters library's `phm_layer`.
    """

    sites: ClassVar[SiteSpec] = SiteSpec(
        hooks={"join": "compute", "__call__": "compute_alone"}, applies=_joins
    )
    peft: ClassVar[PeftFormat[Any]] = BottleneckFormat(
        layout="adapters",
        module_prefix="",
        options={
            **TARGET_OPTIONS,
            "non_linearity": "non_linearity",
            "reduction_factor": "reduction_factor",
            "scaling": "scaling",
            "dropout": "dropout",
        },
        required=("reduction_factor", "non_linearity"),
        ignored=frozenset(_FORM)
        | {
            "mh_adapter",
            "output_adapter",
            "init_weights",
            "init_weights_seed",
            "inv_adapter_reduction_factor",
            "adapter_residual_before_ln",
            "phm_layer",
            "phm_dim",
            "phm_rank",
            "phm_bias",
            "phm_c_init",
            "phm_init_range",
            "learn_phm",
            "factorized_phm_W",
            "factorized_phm_rule",
            "shared_phm_rule",
            "shared_W_phm",
            "hypercomplex_nonlinearity",
        },
    )

    factored: ClassVar[bool] = False
    usual_targets: ClassVar[tuple[str, ...]] = (*ATTENTION, *FEED_FORWARD)

    targets: str | tuple[str, ...] = option(
        "default", "sites: 'default' for those that sublayers says, or names"
    )
    placement: Placement = option("pfeiffer", "what the adapter reads: houlsby, pfeiffer, parallel")
    sublayers: Literal["default", "attention", "feed_forward", "both"] = option(
        "default",
        "which sub-layers have adapters: attention, feed_forward, both; by default those of the"
        " placement's paper",
    )
    reduction_factor: float = option(
        16.0, "d / b: how many times narrower than the model the bottleneck is", above=0
    )
    non_linearity: NonLinearity = option("relu", "the function in the bottleneck")
    scaling: float | Literal["learned", "channel"] = option(
        1.0, "factor s: a number, or 'learned', or learned by 'channel'"
    )
    dropout: float = option(0.0, "rate of dropout on what the adapter gives", at_least=0, below=1)

    def problems(self) -> list[str]:
        """List options that exclude each other, or that no file can say."""
        found = super().problems()
        if self.sublayers != "default" and self.targets != "default":
            found.append(
                "sublayers: goes with targets 'default'; the targets name the sites already"
            )
        if self.modules_to_save:
            found.append(
                "modules_to_save: files of the adapters library have no place for other modules;"
                " leave it empty"
            )
        return found

    def where(self, names: tuple[str, ...]) -> Targets:
        """Return the target options; by default the modules that write to the residual stream
        behind the sub-layers.
        """
        wanted = super().where(names)
        if self.targets != "default":
            return wanted
        on = _USUAL[self.placement] if self.sublayers == "default" else self.sublayers
        entries = usual_targets(
            ATTENTION * (on != "feed_forward") + FEED_FORWARD * (on != "attention"), names
        )
        exclude = self.exclude
        if on == "feed_forward":
            exclude = (
                (*exclude, ATTENTION[1])
                if isinstance(exclude, tuple)
                else rf"{exclude}|.*\.{ATTENTION[1]}"
            )
        return Targets(entries, exclude, wanted.layers_to_transform, wanted.layers_pattern)

    def width(self, site: Site) -> int:
        """Return the width b of the bottleneck at a site."""
        return max(1, int(site.shape[1] // self.reduction_factor))

    def site_leaves(self, site: Site, own: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """Make the leaves of a site, float32.

        Args:
            site: one layer of a site.
            own: the matrices and what belongs to them, by their names without the method's.
        """
        made = {**own, self.placement: jnp.ones(()), self.non_linearity: jnp.ones(())}
        if isinstance(self.scaling, str):
            made["gain"] = jnp.ones((site.shape[1] if self.scaling == "channel" else 1,))
        else:
            made["scale"] = jnp.asarray(self.scaling)
        if self.dropout:
            made["dropout"] = jnp.asarray(self.dropout)
        return {f"{self.name}_{key}": leaf.astype(jnp.float32) for key, leaf in made.items()}


def join_residual(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Compute where a sub-layer's output joins the residual stream: `N(x + h + A(z))`, `[..., d]`,
    in the dtype of `h`.

    Args:
        call: with `h` and `x` `[..., d]`, and `N` or None.
        name: of the method.
        network: `A` less its dropout.
    """
    h, x, *norm = call.args
    z = h
    if f"{name}_parallel" in call.leaves:
        z = x
    elif f"{name}_pfeiffer" in call.leaves:
        z = call.base(*call.args, **call.kwargs)
    return call.base(h + _add(call, name, network, z).astype(h.dtype), x, *norm, **call.kwargs)


def add_to_output(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Compute a module that does not say where its output joins the residual stream: `h + A(h)`,
    `[..., in] -> [..., d]`.

    Args:
        call: of a linear module.
        name: of the method.
        network: `A` less its dropout.

    Raises:
        ConfigError: the placement needs the residual stream.
    """
    for placement in ("parallel", "pfeiffer"):
        if f"{name}_{placement}" in call.leaves:
            raise ConfigError(
                f"{name}: placement {placement!r} reads the residual stream, and a module that is"
                " adapted does not say where it joins it; take placement 'houlsby', or in a model"
                " of jaxpeft.load targets 'default'"
            )
    h = call.base(*call.args, **call.kwargs)
    return h + _add(call, name, network, h)


def _add(call: Call, name: str, network: Callable[[Leaves, Any], Any], z: Any) -> Any:
    return drop_input(call, call.each(network, z), f"{name}_dropout")


def bottleneck(leaves: Leaves, name: str, z: Any, down: Any, up: Any) -> Any:
    """Return `s (act(z W_down + b_down) W_up + b_up)`, `[..., d] -> [..., d]`, in the dtype of `z`.

    Args:
        leaves: of the site.
        name: of the method.
        z: `[..., d]`.
        down: `W_down [d, b]`, float32.
        up: `W_up [b, d]`, float32.
    """
    from jaxpeft.models.activations import ACTIVATIONS

    own = {
        key: leaves[f"{name}_{key}"].astype(z.dtype)
        for key in ("down_bias", "up_bias", "scale", "gain")
        if f"{name}_{key}" in leaves
    }
    act = next(ACTIVATIONS[key] for key in get_args(NonLinearity) if f"{name}_{key}" in leaves)
    inner = act(z @ down.astype(z.dtype) + own["down_bias"])
    return (inner @ up.astype(z.dtype) + own["up_bias"]) * own.get("gain", own.get("scale"))
