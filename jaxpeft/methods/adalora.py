r"""AdaLoRA: updates in the form of a singular value decomposition, with ranks allocated to the most
important sites.

    y = x W + s (D(x) A diag(e)) B,    A: [in, r],  e: [r],  B: [r, out],  s = alpha / (r + 1e-5)

In the paper's words A is Q', e is Lambda and B is P' (equation 3). `e` starts at zero, so a fresh
adapter does not change any output; `D` is dropout. The loss is raised by `orthogonality` times
the mean of ||A'A - I|| and ||B B' - I|| over the sites (equation 4). r stays in `s` what it was at
first, however many entries of `e` are left.

The optimizer is wrapped: it scores the entries of `e` and sets the worst of all sites to zero, ever
more of them, until their mean number is `target_rank` a site (`rank_allocation`).

Zhang et al. 2023, "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
section 3 (arXiv:2303.10512).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from jaxpeft.core import paths
from jaxpeft.core.method import Call, Kernel, Leaves
from jaxpeft.core.options import option
from jaxpeft.core.peft_format import PeftFormat
from jaxpeft.core.specs import LeafSpec, LowRank, SiteSpec
from jaxpeft.core.targets import Site
from jaxpeft.errors import TargetError, nearest
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods import rank_allocation
from jaxpeft.methods.biases import Biased, bias_option
from jaxpeft.methods.dropping import drop_input
from jaxpeft.methods.low_rank import low_rank, product
from jaxpeft.methods.targeted import TARGET_OPTIONS, TargetedFormat

if TYPE_CHECKING:
    import optax


@dataclass(frozen=True)
class AdaLoRAFormat(TargetedFormat["AdaLoRA"]):
    """The file format of `AdaLoRA` adapters."""

    def pack(self, method: AdaLoRA, site: Site, leaves: Leaves) -> dict[str, Any]:
        """Return the tensors in PEFT's format."""
        left = method.rank_pattern.get(site.name, method.rank)
        a, e, b = (leaves[name] for name in ("adalora_a", "adalora_e", "adalora_b"))
        return {"lora_A": a.T[:left], "lora_E": e[:left, None], "lora_B": b.T[:, :left]}

    def unpack(self, method: AdaLoRA, site: Site, tensors: Leaves, fresh: Leaves) -> dict[str, Any]:
        """Return the leaves; a site of rank zero keeps its zeros."""
        if not method.rank_pattern.get(site.name, method.rank):
            return dict(fresh)
        a, e, b = tensors["lora_A"].T, tensors["lora_E"][:, 0], tensors["lora_B"].T
        return {**fresh, "adalora_a": a, "adalora_e": e, "adalora_b": b}

    def write_options(self, method: AdaLoRA) -> dict[str, Any]:
        """Return the options; PEFT requires a number of steps but does not use it."""
        left = method.rank_pattern.items()
        pattern = {
            f"{name}.lora_E": [True] * kept + [False] * (method.rank - kept) for name, kept in left
        }
        steps = {
            "total_step": method.initial_steps + method.final_steps + 1,
            "init_lora_weights": True,
        }
        return super().write_options(method) | steps | {"rank_pattern": pattern or None}

    def read_options(
        self, kind: type[AdaLoRA], config: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Read the options, with the number of kept entries as `rank_pattern`."""
        values, problems = super().read_options(kind, config)
        pattern: Any = values.pop("rank_pattern", None) or {}
        if not isinstance(pattern, Mapping) or not all(
            isinstance(kept, list) for kept in pattern.values()
        ):
            return values, [
                *problems,
                "rank_pattern: must be a list of booleans for each site",
            ]
        values["rank_pattern"] = {
            key.partition(".lora_E")[0]: sum(map(bool, kept)) for key, kept in pattern.items()
        }
        if isinstance(values.get("target_rank"), int) and isinstance(values.get("rank"), int):
            values["target_rank"] = min(values["target_rank"], values["rank"])
        return values, problems


def _low_rank_update(shape: tuple[int, int], leaves: Leaves) -> LowRank:
    """Return the update of a site, with `e B` as B."""
    del shape
    b = leaves["adalora_e"][:, None] * leaves["adalora_b"]
    return LowRank(leaves["adalora_a"], b, leaves["adalora_scale"])


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(Biased):
    """Low-rank adaptation of linear sites whose ranks are allocated during training.

    Leaves of a site: `adalora_a [in, r]`, `adalora_e [r]`, `adalora_b [r, out]`, trained;
    `adalora_scale []`, `adalora_dropout []` if the rate is not zero. All float32. A file holds
    all r entries, those that are set to zero among them; of a file of PEFT's that was cut,
    `rank_pattern` says what is left.

    Raises:
        ConfigError: An option is out of range, or options are incompatible.
    """

    name: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv:2303.10512"
    leaves: ClassVar[LeafSpec] = LeafSpec(
        site=("adalora_a", "adalora_e", "adalora_b", "adalora_scale", "adalora_dropout"),
        trained=frozenset({"adalora_a", "adalora_e", "adalora_b"}),
    )
    sites: ClassVar[SiteSpec] = SiteSpec(update=_low_rank_update)
    peft: ClassVar[PeftFormat[Any]] = AdaLoRAFormat(
        type="ADALORA",
        options={
            **TARGET_OPTIONS,
            "init_r": "rank",
            "target_r": "target_rank",
            "lora_alpha": "alpha",
            "lora_dropout": "dropout",
            "bias": "bias",
            "tinit": "initial_steps",
            "tfinal": "final_steps",
            "deltaT": "interval",
            "beta1": "beta1",
            "beta2": "beta2",
            "orth_reg_weight": "orthogonality",
            "rank_pattern": "rank_pattern",
        },
        required=("init_r", "lora_alpha"),
        ignored=frozenset(
            {
                "r",
                "total_step",
                "init_lora_weights",
                "eva_config",
                "loftq_config",
                "corda_config",
                "lora_ga_config",
                "qalora_group_size",
                "megatron_core",
                "fan_in_fan_out",
            }
        ),
    )

    rank: int = option(12, "initial rank r of every site", at_least=1)
    target_rank: int = option(8, "final mean rank of the sites", at_least=1)
    alpha: float = option(16.0, "numerator of the scaling", above=0)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    bias: Literal["none", "all", "lora_only"] = bias_option()
    initial_steps: int = option(0, "steps at the start without rank reduction", at_least=0)
    final_steps: int = option(0, "steps at the end with fixed ranks", at_least=0)
    interval: int = option(1, "steps between two allocations", at_least=1)
    beta1: float = option(0.85, "decay of the average of the sensitivity", above=0, below=1)
    beta2: float = option(0.85, "decay of the average of its uncertainty", above=0, below=1)
    orthogonality: float = option(
        0.5, "weight of the penalty that keeps A and B orthogonal", at_least=0
    )
    rank_pattern: dict[str, int] = option(
        {}, "remaining ranks of individual sites, by full name", at_least=0
    )

    def problems(self) -> list[str]:
        """List incompatible options."""
        found = super().problems()
        if self.target_rank > self.rank:
            found.append(
                f"target_rank: is {self.target_rank}, but must not be above rank {self.rank}"
            )
        found += [
            f"rank_pattern: {name!r} is {left}, but must not be above rank {self.rank}"
            for name, left in self.rank_pattern.items()
            if left > self.rank
        ]
        return found

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Raise an error if `rank_pattern` has a name that is not an adapted site.

        Raises:
            TargetError: It has; the message lists the names.
        """
        unknown = [name for name in self.rank_pattern if name not in names]
        if unknown:
            raise TargetError(
                [
                    f"rank_pattern: {name!r} is not an adapted site{nearest(name, names)}"
                    for name in unknown
                ]
            )

    # --------------------------------------------------------------------------------------- leaves

    def init(self, site: Site, kernel: Kernel, rng: jax.Array) -> dict[str, jax.Array]:
        """Initialize A and B from a normal distribution and e to zero.

        A site whose rank is reduced to zero has one entry of zeros.
        """
        del kernel
        left = self.rank_pattern.get(site.name, self.rank)
        (n_in, n_out), r = site.shape, max(1, left)
        keys, size = jax.random.split(rng), 0.02 if left else 0.0
        leaves = {
            "adalora_a": size * jax.random.normal(keys[0], (n_in, r), jnp.float32),
            "adalora_e": jnp.zeros((r,), jnp.float32),
            "adalora_b": size * jax.random.normal(keys[1], (r, n_out), jnp.float32),
            "adalora_scale": jnp.asarray(self.alpha / (self.rank + 1e-5), jnp.float32),
        }
        return leaves | (
            {"adalora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {}
        )

    @staticmethod
    def compute(call: Call) -> Any:
        """Compute `x W + (D(x) A) (s e B)`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y = call.base(*call.args)
        return y + call.each(_update, drop_input(call, call.x.astype(y.dtype), "adalora_dropout"))

    @staticmethod
    def fold(leaves: Leaves, base: Leaves) -> dict[str, Any]:
        """Return `W + s A diag(e) B`."""
        return {"kernel": base["kernel"] + product(leaves["adalora_a"], _scale(leaves))}

    # ------------------------------------------------------------------------------------- training

    def penalty(self, trainable: Leaves) -> Any:
        """Return `orthogonality` times the mean of ||A'A - I|| and ||B B' - I||, unpadded."""
        if not self.orthogonality:
            return None
        total, count = jnp.zeros(()), jnp.zeros(())
        for site in _sites(trainable):
            a, b = site["adalora_a"], site["adalora_b"]
            used = rank_allocation.entries(a)
            unit = jnp.where(used[..., None], jnp.eye(used.shape[-1]), 0.0)
            for rows in (jnp.swapaxes(a, -1, -2), b):
                gap = product(rows, jnp.swapaxes(rows, -1, -2)) - unit
                squares = jnp.sum(jnp.square(gap), (-2, -1))
                some = squares > 0  # the root of zero has no gradient
                total += jnp.sum(jnp.where(some, jnp.sqrt(jnp.where(some, squares, 1.0)), 0.0))
                count += jnp.sum(used.any(-1).astype(jnp.float32))
        return self.orthogonality * total / jnp.maximum(count, 1.0)

    def optimizer(
        self, inner: optax.GradientTransformation, steps: int
    ) -> optax.GradientTransformation:
        """Wrap the optimizer so that it allocates the ranks.

        Raises:
            ConfigError: The run is too short for `initial_steps` and `final_steps`.
        """
        return rank_allocation.allocate_ranks(self, inner, steps)

    # ---------------------------------------------------------------------------------------- files


def _sites(tree: Leaves) -> list[Leaves]:
    """Return the modules of a tree with the method's leaves."""
    return [paths.get(tree, path[:-1]) for path, _ in paths.walk(tree) if path[-1] == "adalora_a"]


def _scale(leaves: Leaves) -> Any:
    return (leaves["adalora_scale"] * leaves["adalora_e"])[:, None] * leaves["adalora_b"]


def _update(leaves: Leaves, x: Any) -> Any:
    """Return `(x A) (s e B)`, `[..., in] -> [..., out]`, in the dtype of `x`."""
    return low_rank(x, leaves["adalora_a"], _scale(leaves))
