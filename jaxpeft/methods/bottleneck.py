"""The base class of bottleneck adapters: their placement, computation and files.

`h` is the output of a sub-layer, `x` its input before its own norm, and `N` the norm after their
sum, which decoders do not have. Without an adapter `A`, the layer's output is `N(x + h)`; with it,
depending on `placement`, it is

* `houlsby`: `N(x + h + A(h))`, after attention and feed-forward (Houlsby et al. 2019, section 2.1,
  arXiv:1902.00751);
* `pfeiffer`: `N(x + h + A(N(x + h)))`, after feed-forward (Pfeiffer et al. 2020, section 3.2,
  arXiv:2005.00247);
* `parallel`: `N(x + h + A(x))`, parallel to feed-forward (He et al. 2021, section 3.3,
  arXiv:2110.04366).

Files are those of the `adapters` library (Poth et al. 2023, arXiv:2311.11077).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args

from jaxpeft.core.method import Call, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.paths import EXPERTS
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import SiteSpec
from jaxpeft.core.targets import Site, Targets, usual_targets
from jaxpeft.errors import ConfigError, TargetError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted, TargetedFormat

ATTENTION = ("self_attn.o_proj", "attention.output.dense", "attention.out_lin", "attn.Wo")
FEED_FORWARD = ("mlp.down_proj", "output.dense", "ffn.lin2", "mlp.Wo")
"""Name suffixes of the modules that write to the residual stream; BERT's second also matches its
first.
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
        name: name of the method.
        *own: names of the matrices and biases, without the method's name.
    """
    form = ("scale", "gain", "dropout", *get_args(Placement), *get_args(NonLinearity))
    return tuple(f"{name}_{key}" for key in (*own, *form))


def _joins(module: Any, name: str) -> bool:
    """Return whether to compute a module's method: `join`, or any if the module has no `join`."""
    return name == "join" or not hasattr(module, "join")


M = TypeVar("M", bound="Bottleneck")


@dataclass(frozen=True)
class BottleneckFormat(TargetedFormat[M]):
    """The file format of `Bottleneck` adapters."""

    def reads(self, kind: type[M], config: Mapping[str, Any]) -> bool:
        """Return whether a config belongs to this method, also in the adapters library's format."""
        section = (
            config.get("peft_type") == self.layout
            and bool(config.get("phm_layer")) == kind.factored
        )
        return section or super().reads(kind, config)

    def names(self, kind: type[M]) -> Mapping[str, str]:
        """Map the adapters library's option names to the method's."""
        return self.options

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options in the adapters library's format; the layout defines the sites."""
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
            form["original_ln_before"] = False  # has no effect, since the adapter reads x
        if form["original_ln_before"] is False:
            form["residual_before_ln"] = True  # has no effect
        placement = next((name for name, flags in _FORMS.items() if flags == form), None)
        on = (bool(config.get("mh_adapter")), bool(config.get("output_adapter")))
        sublayers = {
            (True, True): "both",
            (True, False): "attention",
            (False, True): "feed_forward",
        }.get(on)
        if placement is None:
            text = ", ".join(f"{key} {value!r}" for key, value in form.items())
            problems.append(f"{text}: does not match a placement ({', '.join(_FORMS)})")
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
    """A method that adds a small network after sub-layers, or parallel to them.

    Leaves of a site in addition to the matrices: `scale []`, or a trained `gain [1 or d]`;
    `dropout []` if the rate is not zero; and two scalars whose names say the placement and the
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
        "default", "sites: 'default' for those of sublayers, or names"
    )
    placement: Placement = option("pfeiffer", "input of the adapter: houlsby, pfeiffer, parallel")
    sublayers: Literal["default", "attention", "feed_forward", "both"] = option(
        "default",
        "sub-layers with adapters: attention, feed_forward, both; by default as in the placement's"
        " paper",
    )
    reduction_factor: float = option(
        16.0, "d / b: ratio of the model's width to the bottleneck's", above=0
    )
    non_linearity: NonLinearity = option("relu", "activation in the bottleneck")
    scaling: float | Literal["learned", "channel"] = option(
        1.0, "factor s: a number, 'learned', or 'channel' (learned per channel)"
    )
    dropout: float = option(0.0, "dropout rate of the adapter's output", at_least=0, below=1)

    def problems(self) -> list[str]:
        """List options that are incompatible or cannot be saved."""
        found = super().problems()
        if self.sublayers != "default" and self.targets != "default":
            found.append("sublayers: needs targets 'default'; these targets already name the sites")
        if self.modules_to_save:
            found.append(
                "modules_to_save: files of the adapters library cannot store other modules; leave"
                " it empty"
            )
        return found

    def where(self, names: tuple[str, ...]) -> Targets:
        """Return the target options; by default the last modules of the sub-layers.

        Raises:
            TargetError: Feed-forwards are to be adapted, but experts are in their place.
        """
        wanted = super().where(names)
        if self.targets != "default":
            return wanted
        on = _USUAL[self.placement] if self.sublayers == "default" else self.sublayers
        expert = next((name for name in names if f".{EXPERTS}." in name), None)
        if on != "attention" and expert is not None:
            raise TargetError(
                f"{self.name}.sublayers: {on!r} adapts feed-forwards, but this model has experts in"
                f" their place, such as {expert}; set sublayers to 'attention'"
            )
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
        """Return all float32 leaves of a site.

        Args:
            site: one layer of a site.
            own: the matrices and biases, by names without the method's.
        """
        leaves = {**own, self.placement: jnp.ones(()), self.non_linearity: jnp.ones(())}
        if isinstance(self.scaling, str):
            leaves["gain"] = jnp.ones((site.shape[1] if self.scaling == "channel" else 1,))
        else:
            leaves["scale"] = jnp.asarray(self.scaling)
        if self.dropout:
            leaves["dropout"] = jnp.asarray(self.dropout)
        return {f"{self.name}_{key}": leaf.astype(jnp.float32) for key, leaf in leaves.items()}


def join_residual(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Compute `N(x + h + A(z))`, `[..., d]`, in the dtype of `h`.

    Args:
        call: call of `join` with `h` and `x` `[..., d]`, and `N` or None.
        name: name of the method.
        network: `A` without dropout.
    """
    h, x, *norm = call.args
    z = h
    if f"{name}_parallel" in call.leaves:
        z = x
    elif f"{name}_pfeiffer" in call.leaves:
        z = call.base(*call.args, **call.kwargs)
    return call.base(h + _add(call, name, network, z).astype(h.dtype), x, *norm, **call.kwargs)


def add_to_output(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Compute `h + A(h)`, `[..., in] -> [..., d]`, for a module without `join`.

    Args:
        call: call of a linear module.
        name: name of the method.
        network: `A` without dropout.

    Raises:
        ConfigError: The placement needs the residual stream.
    """
    for placement in ("parallel", "pfeiffer"):
        if f"{name}_{placement}" in call.leaves:
            raise ConfigError(
                f"{name}: placement {placement!r} needs the residual stream, which an adapted"
                " module does not provide; use placement 'houlsby', or, in a model of"
                " jaxpeft.load, targets 'default'"
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
