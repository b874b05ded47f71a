r"""Bottleneck adapters: a small network behind each sub-layer, or beside it.

    A(z) = D(s (act(z W_down + b_down) W_up + b_up)),    W_down: [d, b],  W_up: [b, d],  b = d / reduction_factor

`h` is what a sub-layer gives, `x` what it was given, before its own norm, and `N` the norm behind their sum: BERT's, and none
in a decoder. `D` is dropout. Without the adapter a layer goes on with `N(x + h)`; with it, by `placement`, with

* `houlsby`: `N(x + h + A(h))`, behind attention and feed-forward (Houlsby et al. 2019, section 2.1, arXiv:1902.00751);
* `pfeiffer`: `N(x + h + A(N(x + h)))`, behind feed-forward (Pfeiffer et al. 2020, section 3.2, arXiv:2005.00247);
* `parallel`: `N(x + h + A(x))`, beside feed-forward (He et al. 2021, section 3.3, arXiv:2110.04366, with `s = 4`).

`W_up` and the biases start at zero, so a fresh adapter leaves every output as it was; with `init_weights` `bert` or `houlsby`
both matrices are small and random, and it nearly does. `scaling` is a number, one that is trained, or one that is trained for
each of the d channels; these begin at one.

The leaves stand beside the kernel of the linear module that makes `h`. One that does not say where its output joins the
residual stream, as another's `nn.Dense`, has no `x`: it can be adapted in `houlsby`'s place only. Files are those of the
`adapters` library (Poth et al. 2023, arXiv:2311.11077).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.targets import Site, Targets, usual
from jaxpeft.errors import ConfigError
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.lora import dropped
from jaxpeft.methods.targeted import TARGET_OPTIONS, Targeted

ATTENTION = ("self_attn.o_proj", "attention.output.dense", "attention.out_lin")
FEED_FORWARD = ("mlp.down_proj", "output.dense", "ffn.lin2")
"""The ends of the names of the modules that write to the residual stream; BERT's second is an end of its first, too."""

Placement = Literal["houlsby", "pfeiffer", "parallel"]
NonLinearity = Literal[
    "relu", "gelu", "gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "quick_gelu", "silu", "swish", "tanh",
    "sigmoid", "leaky_relu", "mish", "relu6", "relu2", "laplace", "linear",
]  # fmt: skip
_FORM = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln")
_FORMS: Mapping[str, tuple[bool, ...]] = {
    "houlsby": (False, False, True, True),
    "pfeiffer": (False, True, True, True),
    "parallel": (True, False, True, True),
}
_USUAL = {"houlsby": "both", "pfeiffer": "feed_forward", "parallel": "feed_forward"}
_INITS = {"lora": "mam_adapter", "bert": "bert", "houlsby": "houlsby"}
_ABSENT = {"is_parallel": False, "original_ln_before": False, "original_ln_after": True, "residual_before_ln": True}


@dataclass(frozen=True, kw_only=True)
class Adapter(Targeted):
    """Bottleneck adapters behind or beside sub-layers.

    Leaves of a site: `adapter_down [d, b]`, `adapter_down_bias [b]`, `adapter_up [b, d]`, `adapter_up_bias [d]`, trained;
    `adapter_scale []`, or `adapter_gain [1 or d]` that is trained; `adapter_dropout []` where the rate is not zero; and two
    scalars whose names say the placement and the non-linearity, as in `adapter_pfeiffer`, `adapter_relu`. All float32.

    Raises:
        ConfigError: an option is out of range, or options exclude each other.
    """

    name: ClassVar[str] = "adapter"
    paper: ClassVar[str] = "arXiv:1902.00751"
    leaf_names: ClassVar[tuple[str, ...]] = (
        "adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias", "adapter_scale", "adapter_gain", "adapter_dropout",
        *(f"adapter_{name}" for name in (*get_args(Placement), *get_args(NonLinearity))),
    )  # fmt: skip
    trained_leaves: ClassVar[frozenset[str]] = frozenset(
        {"adapter_down", "adapter_down_bias", "adapter_up", "adapter_up_bias", "adapter_gain"}
    )
    hooks: ClassVar[Mapping[str, str]] = {"join": "compute", "__call__": "compute_alone"}
    mergeable: ClassVar[bool] = False
    layout: ClassVar[str] = "adapters"
    peft_options: ClassVar[Mapping[str, str]] = TARGET_OPTIONS | {
        "non_linearity": "non_linearity",
        "reduction_factor": "reduction_factor",
        "scaling": "scaling",
        "dropout": "dropout",
    }
    peft_required: ClassVar[tuple[str, ...]] = ("reduction_factor", "non_linearity")
    # how a matrix began, what inverts, and where a norm stands that there is not
    peft_ignored: ClassVar[frozenset[str]] = frozenset({
        "init_weights", "init_weights_seed", "inv_adapter_reduction_factor", "adapter_residual_before_ln", "mh_adapter",
        "output_adapter", "phm_dim", "phm_rank", "phm_bias", "phm_c_init", "phm_init_range", "learn_phm", "factorized_phm_W",
        "factorized_phm_rule", "shared_phm_rule", "shared_W_phm", "hypercomplex_nonlinearity",
    })  # fmt: skip
    files: ClassVar[Mapping[str, str]] = {
        "adapter_down": "adapter_down.0.weight",
        "adapter_down_bias": "adapter_down.0.bias",
        "adapter_up": "adapter_up.weight",
        "adapter_up_bias": "adapter_up.bias",
        "adapter_gain": "scaling",
    }
    usual_targets: ClassVar[tuple[str, ...]] = (*ATTENTION, *FEED_FORWARD)

    targets: str | tuple[str, ...] = option("default", "sites: 'default' for those that sublayers says, or names")
    placement: Placement = option("pfeiffer", "what the adapter reads, and where what it gives is added")
    sublayers: Literal["default", "attention", "feed_forward", "both"] = option(
        "default", "which sub-layers have adapters: attention, feed_forward, both; by default those of the placement's paper"
    )
    reduction_factor: float = option(16.0, "d / b: how many times narrower than the model the bottleneck is", above=0)
    non_linearity: NonLinearity = option("relu", "the function in the bottleneck")
    scaling: float | Literal["learned", "channel"] = option(1.0, "factor s: a number, or 'learned', or learned by 'channel'")
    dropout: float = option(0.0, "rate of dropout on what the adapter gives", at_least=0, below=1)
    init_weights: Literal["lora", "bert", "houlsby"] = option("lora", "how the matrices begin: 'lora' with W_up at zero")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights != "lora":
            object.__setattr__(self, "fresh_is_base", False)

    def problems(self) -> list[str]:
        """Lists options that exclude each other, or that no file can say."""
        found = super().problems()
        if self.sublayers != "default" and self.targets != "default":
            found.append("sublayers: goes with targets 'default'; the targets name the sites already")
        if self.modules_to_save:
            found.append("modules_to_save: files of the adapters library have no place for other modules; leave it empty")
        return found

    def where(self, names: tuple[str, ...]) -> Targets:
        """Gives the target options; by default the modules that write to the residual stream behind the sub-layers."""
        if self.targets != "default":
            return super().where(names)
        on = _USUAL[self.placement] if self.sublayers == "default" else self.sublayers
        entries = usual(ATTENTION * (on != "feed_forward") + FEED_FORWARD * (on != "attention"), names)
        wanted = super().where(names)
        if on != "feed_forward":
            return Targets(entries, wanted.exclude, wanted.layers_to_transform, wanted.layers_pattern)
        bert = ATTENTION[1]
        exclude = (*self.exclude, bert) if isinstance(self.exclude, tuple) else rf"{self.exclude}|.*\.{bert}"
        return Targets(entries, exclude, wanted.layers_to_transform, wanted.layers_pattern)

    def width(self, site: Site) -> int:
        """Gives the width b of the bottleneck at a site."""
        return max(1, int(site.shape[1] // self.reduction_factor))

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Makes the matrices as `init_weights` says, and the biases zero."""
        del kernel
        d, b = site.shape[1], self.width(site)
        down, up = _begin(self.init_weights, d, b, rng)
        made = {"down": down, "down_bias": jnp.zeros((b,)), "up": up, "up_bias": jnp.zeros((d,))}
        return {f"adapter_{key}": leaf.astype(jnp.float32) for key, leaf in (made | self.form(d)).items()}

    def form(self, d: int) -> dict[str, jax.Array]:
        """Makes the leaves that hold the scaling and the dropout, and those whose names say the form.

        Args:
            d: the model's width.
        """
        made = {self.placement: jnp.ones(()), self.non_linearity: jnp.ones(())}
        if isinstance(self.scaling, str):
            made["gain"] = jnp.ones((d if self.scaling == "channel" else 1,))
        else:
            made["scale"] = jnp.asarray(self.scaling)
        return made | ({"dropout": jnp.asarray(self.dropout)} if self.dropout else {})

    @classmethod
    def computes(cls, module: Any, name: str) -> bool:
        """Computes where a module's output joins the residual stream; of a module that does not say where, its output."""
        return super().computes(module, name) and (name == "join" or not hasattr(module, "join"))

    @staticmethod
    def compute(call: Call) -> Any:
        """Computes `N(x + h + A(z))` of `h`, `x` and `N`, `[..., d]`, in the dtype of `h`."""
        return joined(call, "adapter", _bottleneck)

    @staticmethod
    def compute_alone(call: Call) -> Any:
        """Computes `h + A(h)`, `[..., in] -> [..., d]`."""
        return alone(call, "adapter", _bottleneck)

    @classmethod
    def file_options(cls) -> Mapping[str, str]:
        """Gives the method's options by what the adapters library calls them."""
        return cls.peft_options

    def to_peft(self) -> dict[str, Any]:
        """Gives the options as the adapters library has them; the sites are told by its files' layout."""
        values = {key: value for key, value in super().to_peft().items() if key not in TARGET_OPTIONS}
        return values | dict(zip(_FORM, _FORMS[self.placement], strict=True)) | {"init_weights": _INITS[self.init_weights]}

    @classmethod
    def from_peft(cls, config: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Reads the options of the adapters library."""
        flags = {key: config.get(key, absent) for key, absent in _ABSENT.items()}
        values, problems = super().from_peft({key: value for key, value in config.items() if key not in flags})
        if flags["is_parallel"] is True:
            flags |= {"original_ln_before": False, "residual_before_ln": True}  # it reads x, whatever they say
        elif flags["original_ln_before"] is False:
            flags["residual_before_ln"] = True
        placement = next((name for name, form in _FORMS.items() if form == tuple(flags.values())), None)
        if placement is None:
            said = ", ".join(f"{key} {value!r}" for key, value in flags.items())
            return values, [*problems, f"original_ln_before: {said} is none of the placements {', '.join(_FORMS)}"]
        on = (bool(config.get("mh_adapter")), bool(config.get("output_adapter")))
        sublayers = {(True, True): "both", (True, False): "attention", (False, True): "feed_forward"}.get(on)
        if sublayers is None:
            problems.append("mh_adapter, output_adapter: neither is true, so there is no adapter")
        begun = next((ours for ours, theirs in _INITS.items() if theirs == config.get("init_weights")), "lora")
        values["placement"] = placement
        values["sublayers"] = "default" if sublayers in (None, _USUAL[placement]) else sublayers
        return values | {"init_weights": begun}, problems


def _begin(how: str, d: int, b: int, rng: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes `W_down` and `W_up`."""
    keys = jax.random.split(rng)
    if how == "bert":
        return 0.02 * jax.random.normal(keys[0], (d, b)), 0.02 * jax.random.normal(keys[1], (b, d))
    if how == "houlsby":
        down, up = (jax.random.truncated_normal(key, -2, 2, s) for key, s in zip(keys, ((d, b), (b, d)), strict=True))
        return 0.01 * down, 0.01 * up
    return jax.random.uniform(keys[0], (d, b), minval=-1, maxval=1) / math.sqrt(d), jnp.zeros((b, d))


def joined(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Computes where a sub-layer's output joins the residual stream.

    Args:
        call: with `h` and `x` `[..., d]`, and the norm or None.
        name: what the names of the leaves begin with.
        network: the adapter, less its dropout.
    """
    h, x, *norm = call.args
    z = h
    if f"{name}_parallel" in call.leaves:
        z = x
    elif f"{name}_pfeiffer" in call.leaves:
        z = call.base(*call.args, **call.kwargs)
    return call.base(h + _dropped(call, name, call.each(network, z)), x, *norm, **call.kwargs)


def alone(call: Call, name: str, network: Callable[[Leaves, Any], Any]) -> Any:
    """Computes a module that does not say where its output joins the residual stream.

    Args:
        call: of a linear module.
        name: what the names of the leaves begin with.
        network: the adapter, less its dropout.

    Raises:
        ConfigError: the placement needs the residual stream.
    """
    for placement in ("parallel", "pfeiffer"):
        if f"{name}_{placement}" in call.leaves:
            raise ConfigError(
                f"{name}: placement {placement!r} reads the residual stream, and a module that is adapted does not say where "
                "it joins; take placement 'houlsby', or sites that do, as 'default' has them in a model of jaxpeft.load"
            )
    h = call.base(*call.args, **call.kwargs)
    return h + _dropped(call, name, call.each(network, h))


def _dropped(call: Call, name: str, out: Any) -> Any:
    return dropped(call, out, f"{name}_dropout")


def _bottleneck(leaves: Leaves, z: Any) -> Any:
    """Gives `s (act(z W_down + b_down) W_up + b_up)`, `[..., d] -> [..., d]`, in the dtype of `z`."""
    cast = {key: leaf.astype(z.dtype) for key, leaf in leaves.items()}
    inner = activation(leaves, "adapter")(z @ cast["adapter_down"] + cast["adapter_down_bias"])
    return (inner @ cast["adapter_up"] + cast["adapter_up_bias"]) * scale(cast, "adapter")


def activation(leaves: Leaves, name: str) -> Callable[[Any], Any]:
    """Gives the function that the name of a leaf says."""
    from jaxpeft.models.activations import ACTIVATIONS

    return next(ACTIVATIONS[act] for act in get_args(NonLinearity) if f"{name}_{act}" in leaves)


def scale(leaves: Leaves, name: str) -> Any:
    """Gives the scaling s, fixed or learned."""
    return leaves[f"{name}_gain"] if f"{name}_gain" in leaves else leaves[f"{name}_scale"]
