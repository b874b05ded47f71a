r"""LoRA: a low-rank update beside a frozen kernel.

    y = x W + s (D(x) A) B,    A: [in, r],    B: [r, out],
        s = alpha / r, or alpha / sqrt(r) with rsLoRA

`D` is dropout. `A` starts uniform, `B` at zero, so a fresh adapter does not change any output.
`A` and `B` are float32 whatever the base is; the products run in the model's compute dtype. On an
embedding `x` is the one-hot row of a token.

`init_weights` chooses another start. One that begins in a part of `W` takes that part off again,
`- s (D(x) A0) B0` with the frozen start `A0`, `B0`, so the base is never changed; in files such an
adapter is a plain LoRA of twice the rank.

* `gaussian`: `A ~ N(0, 1/r^2)`; `orthogonal`: neither factor is zero, their product is;
* `pissa`: the r largest singular triples of `W` (Meng et al. 2024, equations 2 to 4,
  arXiv:2404.02948);
* `olora`: the first r columns and rows of the QR factors of `W'` (Büyükakyüz 2024, section 3,
  arXiv:2406.01775);
* `eva`: the directions in which the site's inputs vary most over the first batches, and the ranks
  given to those sites where they explain most (Paischer et al. 2024, section 3, arXiv:2410.07170);
* `loftq`: the r largest singular triples of what a quantized base lost (Li et al. 2023, section
  3.2, arXiv:2310.08659).

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1
(arXiv:2106.09685); the scaling of rsLoRA is Kalajdzievski 2023, "A Rank Stabilization Scaling
Factor for Fine-Tuning with LoRA" (arXiv:2312.03732); `lora_plus_ratio` is Hayou et al. 2024,
"LoRA+: Efficient Low Rank Adaptation of Large Models", section 4 (arXiv:2402.12354).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeVar

from jaxpeft.core.method import Call, Kernel, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site, pattern_value
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods import eva, loftq, starts
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TARGET_OPTIONS, Ranked, TargetedFormat
from jaxpeft.methods.token_indices import TOKEN_INDICES

_BASE_CHANGING = ("pissa", "olora", "corda", "lora_ga", "loftq")
_REFUSED: Mapping[str, str] = {
    "layer_replication": "its layers share the weights of the base, and a leaf of the base belongs"
    " to one layer; save the deeper model as a checkpoint of its own and train an adapter of that",
    "alora_invocation_tokens": "it applies from the invocation tokens on, and a site sees its"
    " inputs, but not which tokens they are of",
}

M = TypeVar("M", bound="LoRA")


@dataclass(frozen=True)
class LoRAFormat(TargetedFormat[M]):
    """The file format of `LoRA` adapters."""

    def pack(self, method: M, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return A and B; a subtracted initialization doubles the rank."""
        a, b = _plain(leaves)
        names = _names(site)
        return {names[0]: a.T, names[1]: b.T} | (
            {"lora_B.bias": leaves["lora_bias"]} if "lora_bias" in leaves else {}
        )

    def unpack(self, method: M, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return A and B."""
        names = _names(site)
        found = {"lora_a": tensors[names[0]].T, "lora_b": tensors[names[1]].T}
        return {**fresh, **found} | (
            {"lora_bias": tensors["lora_B.bias"]} if "lora_bias" in fresh else {}
        )

    def write_options(self, method: M) -> dict[str, Any]:
        """Return the options of the equivalent plain LoRA."""
        return super().write_options(method.saved_form()) | {
            "init_lora_weights": True,
            "fan_in_fan_out": False,
        }

    def reads(self, kind: type[M], config: Mapping[str, Any]) -> bool:
        """Return whether an `adapter_config.json` is of a LoRA; with `use_dora` it is DoRA's."""
        return super().reads(kind, config) and not config.get("use_dora")

    def read_options(
        self, kind: type[M], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read LoRA's options; an initialization that changed the base is an error."""
        past = str(config.get("init_lora_weights", "")).lower()
        values, problems = super().read_options(kind, config)
        if past.startswith(_BASE_CHANGING):
            problems.append(
                f"init_lora_weights: {past!r} changed the base at initialization; save the adapter"
                " converted to plain LoRA (in PEFT: save_pretrained(...,"
                " path_initial_model_for_weight_conversion=...))"
            )
        return values, problems


def _plain(leaves: Leaves) -> tuple[Any, Any]:
    """Return A and B; of a subtracted initialization, those of twice the rank."""
    a, b = leaves["lora_a"], leaves["lora_b"]
    if "lora_a0" in leaves:
        a = jnp.concatenate([a, leaves["lora_a0"]], axis=1)
        b = jnp.concatenate([b, -leaves["lora_b0"]])
    return a, b


def low_rank_update(shape: tuple[int, int], leaves: Leaves) -> LowRank | None:
    """Return the update of a site; None with a LoRA bias, which is no product."""
    del shape
    return None if "lora_bias" in leaves else LowRank(*_plain(leaves), leaves["lora_scale"])


def _low_rank(leaves: Leaves, training: bool) -> tuple[Any, Any] | None:
    """Return A and s B; None with dropout, a LoRA bias, or a subtracted initialization, which must
    cancel exactly.
    """
    if "lora_bias" in leaves or "lora_a0" in leaves or (training and "lora_dropout" in leaves):
        return None
    return leaves["lora_a"], leaves["lora_scale"] * leaves["lora_b"]


@dataclass(frozen=True, kw_only=True)
class LoRA(Biased, Ranked):
    """Low-rank adaptation of linear sites and embeddings.

    Leaves of a site: `lora_a [in, r]`, `lora_b [r, out]` and, if asked for, `lora_bias [out]`,
    trained; `lora_scale []`, `lora_dropout []` if the rate is not zero, and the start `lora_a0`,
    `lora_b0` where it is a part of the base, not trained. All float32.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "arXiv:2106.09685"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=(
            "lora_a",
            "lora_b",
            "lora_scale",
            "lora_dropout",
            "lora_a0",
            "lora_b0",
            "lora_bias",
        ),
        trained=frozenset({"lora_a", "lora_b", "lora_bias"}),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(
        kinds=("linear", "embedding"), low_rank=_low_rank, update=low_rank_update
    )
    peft: ClassVar[PeftFormat[Any]] = LoRAFormat(
        type="LORA",
        options={
            **TARGET_OPTIONS,
            "r": "rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "use_rslora": "rslora",
            "bias": "bias",
            "lora_bias": "lora_bias",
            "rank_pattern": "rank_pattern",
            "alpha_pattern": "alpha_pattern",
        },
        # PEFT always writes both; using its defaults would silently change the adapter
        required=("r", "lora_alpha"),
        ignored=frozenset(
            {
                "init_lora_weights",
                "eva_config",
                "loftq_config",
                "corda_config",
                "lora_ga_config",
                "qalora_group_size",
                "megatron_core",
            }
        ),
        refused=_REFUSED,
        companion=TOKEN_INDICES,
    )

    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) in place of alpha / rank")
    bias: Literal["none", "all", "lora_only"] = bias_option()
    lora_bias: bool = option(False, "also train a bias of B")
    init_weights: Literal["default", "gaussian", "orthogonal", "pissa", "olora", "eva", "loftq"] = (
        option("default", "initialization of A and B")
    )
    lora_plus_ratio: float = option(1.0, "ratio of the learning rates of B and A", above=0)
    eva_batches: int = option(8, "number of batches for the initialization 'eva'", at_least=1)
    eva_rho: float = option(
        2.0, "maximum rank of a site with 'eva', as a multiple of rank", at_least=1
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        found = super().problems()
        for name, usual in (("eva_batches", 8), ("eva_rho", 2.0)):
            if self.init_weights != "eva" and getattr(self, name) != usual:
                found.append(
                    f"{name}: needs init_weights 'eva', but it is {self.init_weights!r}; remove it"
                )
        return found

    def site_scale(self, name: str) -> float:
        """Return the scaling s at the site with this Hugging Face name."""
        rank, alpha = self.site_rank(name), pattern_value(name, self.alpha_pattern, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize A and B according to `init_weights`."""
        rank, scale = self.site_rank(site.name), self.site_scale(site.name)
        a, b = starts.STARTS[self.init_weights](site, kernel, rank, scale, rng)
        leaves = {"lora_a": a, "lora_b": b, "lora_scale": jnp.asarray(scale, jnp.float32)}
        if self.init_weights in starts.FROM_KERNEL:
            leaves |= {"lora_a0": a, "lora_b0": b}
        if self.dropout:
            leaves["lora_dropout"] = jnp.asarray(self.dropout, jnp.float32)
        if self.lora_bias:
            leaves["lora_bias"] = jnp.zeros((site.shape[1],), jnp.float32)
        return leaves

    def rate(self, path: Path) -> float:
        """Return the learning rate multiplier, LoRA+'s ratio for B."""
        return self.lora_plus_ratio if path[-1].endswith("_b") else 1.0

    def start(self, params: Leaves, run: Any) -> tuple[Method, Leaves]:
        """Initialize A and B from data or the model's files if `init_weights` requires it."""
        begin = _FROM_RUN.get(self.init_weights)
        return begin(self, params, run) if begin is not None else (self, params)

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (D(x) A) (s B)`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        x = (
            call.x
            if jnp.issubdtype(call.x.dtype, jnp.integer)
            else drop_input(call, call.x.astype(y.dtype), "lora_dropout")
        )
        return y + call.each(update, x).astype(y.dtype)

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s A B`, minus the initialization if it is a part of `W`."""
        scale = leaves["lora_scale"]
        kernel = base["kernel"] + product(leaves["lora_a"], scale * leaves["lora_b"])
        if "lora_a0" in leaves:
            kernel = kernel - product(leaves["lora_a0"], scale * leaves["lora_b0"])
        if "lora_bias" not in leaves:
            return {"kernel": kernel}
        return {"kernel": kernel, "bias": base.get("bias", 0.0) + scale * leaves["lora_bias"]}

    def saved_form(self) -> Self:
        """Return the equivalent plain LoRA, as which it is saved."""
        if self.init_weights not in starts.FROM_KERNEL:
            return dataclasses.replace(self, init_weights="default", eva_batches=8, eva_rho=2.0)
        more = math.sqrt(2) if self.rslora else 2
        return dataclasses.replace(
            self,
            init_weights="default",
            rank=2 * self.rank,
            alpha=more * self.alpha,
            rank_pattern={key: 2 * rank for key, rank in self.rank_pattern.items()},
            alpha_pattern={key: more * alpha for key, alpha in self.alpha_pattern.items()},
        )


_FROM_RUN: Mapping[str, Callable[[LoRA, Leaves, Any], tuple[Method, Leaves]]] = {
    "eva": eva.start,
    "loftq": loftq.start,
}
"""The initializations that need data or the model's files."""


def update(leaves: Leaves, x: Any) -> Any:
    """Return `s (x A) B`, minus the initialization, for `x` `[..., in]` or token ids."""
    scale = leaves["lora_scale"]
    out = _product(x, leaves["lora_a"], scale * leaves["lora_b"])
    if "lora_a0" in leaves:
        out = out - _product(x, leaves["lora_a0"], scale * leaves["lora_b0"])
    return out + (scale * leaves["lora_bias"]).astype(out.dtype) if "lora_bias" in leaves else out


def _product(x: Any, a: Any, b: Any) -> Any:
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jnp.take(a, x, axis=0) @ b
    return low_rank(x, a, b)


def _names(site: Site) -> tuple[str, str]:
    return (
        ("lora_embedding_A", "lora_embedding_B")
        if site.kind == "embedding"
        else ("lora_A.weight", "lora_B.weight")
    )
