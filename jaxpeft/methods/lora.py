r"""LoRA: a low-rank update beside a frozen kernel.

    y = x W + s (D(x) A) B,    A: [in, r],  B: [r, out],  s = alpha / r, or alpha / sqrt(r) with rsLoRA

`D` is dropout. `A` starts uniform, `B` at zero, so a fresh adapter leaves every output as it was. `A` and `B` are float32
whatever the base is; the products run in the model's compute dtype.

Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1 (arXiv:2106.09685); the scaling of
rsLoRA is Kalajdzievski 2023, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA" (arXiv:2312.03732).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxpeft.core.expressions import broken_expression
from jaxpeft.core.method import Call, Leaves, Method
from jaxpeft.core.options import option
from jaxpeft.core.paths import Path
from jaxpeft.core.targets import Site, Targets, pattern_value, require_patterns
from jaxpeft.lazy import jax, jnp
from jaxpeft.methods.low_rank import low_rank


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of linear sites.

    Leaves of a site: `lora_a [in, r]` and `lora_b [r, out]`, trained; `lora_scale []`, and `lora_dropout []` where the
    rate is not zero, not trained. All float32.

    Raises:
        ConfigError: an option is out of range, or options exclude each other.
    """

    name: ClassVar[str] = "lora"
    leaf_names: ClassVar[tuple[str, ...]] = ("lora_a", "lora_b", "lora_scale", "lora_dropout")
    trained_leaves: ClassVar[frozenset[str]] = frozenset({"lora_a", "lora_b"})

    rank: int = option(8, "rank r of the update", at_least=1)
    alpha: float = option(16.0, "numerator of the scaling", above=0)
    dropout: float = option(0.0, "rate of dropout on the input of A", at_least=0, below=1)
    rslora: bool = option(False, "scale by alpha / sqrt(rank) in place of alpha / rank")
    bias: Literal["none", "all", "lora_only"] = option("none", "which biases of the base are trained as well")
    targets: str | tuple[str, ...] = option(
        "all-linear", "list of name suffixes, a regular expression, or 'all-linear'"
    )
    exclude: str | tuple[str, ...] = option((), "names or expression of sites to leave alone")
    layers_to_transform: tuple[int, ...] | int | None = option(None, "layer numbers to adapt; None for all", at_least=0)
    layers_pattern: tuple[str, ...] = option((), "names of the container whose numbers count, such as 'layers'")
    rank_pattern: dict[str, int] = option({}, "other ranks, by the end of a site's name", at_least=1)
    alpha_pattern: dict[str, float] = option({}, "other alphas, by the end of a site's name", above=0)

    def problems(self) -> list[str]:
        """Lists options that exclude each other, as in PEFT."""
        expression = isinstance(self.targets, str) and self.targets.lower() != "all-linear"
        found: list[str] = []
        if expression and (self.layers_to_transform is not None or self.layers_pattern):
            found.append("layers_to_transform: cannot go with a regular expression in targets; put the layers into it")
        if self.layers_pattern and self.layers_to_transform is None:
            found.append("layers_pattern: needs layers_to_transform")
        if self.targets == ():
            found.append("targets: is empty; name at least one site, or 'all-linear'")
        expressions = {"targets": [self.targets] if expression else [], "exclude": [self.exclude]}
        patterns = {
            "layers_pattern": self.layers_pattern,
            "rank_pattern": self.rank_pattern,
            "alpha_pattern": self.alpha_pattern,
        }
        for field, texts in (expressions | patterns).items():
            found += [f"{field}: {why}" for text in texts if (why := broken_expression(text))]
        return found

    def where(self) -> Targets:
        """Gives the target options."""
        layers = self.layers_to_transform
        numbers = (layers,) if isinstance(layers, int) else layers or None
        return Targets(self.targets, self.exclude, numbers, self.layers_pattern, self.modules_to_save)

    def check_sites(self, names: tuple[str, ...]) -> None:
        """Refuses a rank or alpha pattern that matches no adapted site.

        Raises:
            TargetError: naming the pattern.
        """
        require_patterns("rank_pattern", self.rank_pattern, names)
        require_patterns("alpha_pattern", self.alpha_pattern, names)

    def site_rank(self, name: str) -> int:
        """Gives the rank at the site of this Hugging Face name."""
        return pattern_value(name, self.rank_pattern, self.rank)

    def site_scale(self, name: str) -> float:
        """Gives the scaling s at the site of this Hugging Face name."""
        rank, alpha = self.site_rank(name), pattern_value(name, self.alpha_pattern, self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def init(self, name: str, site: Site, base: Leaves, rng: jax.Array) -> dict[str, jax.Array]:
        """Makes `A` uniform within 1/sqrt(in) (Kaiming with a = sqrt(5), as PEFT has it) and `B` zero."""
        del base
        rank, (n_in, n_out) = self.site_rank(name), site.shape
        bound = 1 / math.sqrt(n_in)
        leaves = {
            "lora_a": jax.random.uniform(rng, (n_in, rank), jnp.float32, -bound, bound),
            "lora_b": jnp.zeros((rank, n_out), jnp.float32),
            "lora_scale": jnp.asarray(self.site_scale(name), jnp.float32),
        }
        return leaves | ({"lora_dropout": jnp.asarray(self.dropout, jnp.float32)} if self.dropout else {})

    def trains(self, path: Path, siblings: Leaves) -> bool:
        """Trains A and B, and the biases that `bias` names."""
        if path[-1] == "bias":
            return self.bias == "all" or (self.bias == "lora_only" and "lora_a" in siblings)
        return super().trains(path, siblings)

    @staticmethod
    def compute(call: Call) -> jax.Array:
        """Computes `x W + (D(x) A) (s B)`, `[..., in] -> [..., out]`, in the dtype of `x W`."""
        y, leaves = call.base(call.x), call.leaves
        x = call.x.astype(y.dtype)
        if "lora_dropout" in leaves and call.dropout_key is not None:
            x = dropout(call.dropout_key(), leaves["lora_dropout"], x)
        return y + low_rank(x, leaves["lora_a"], leaves["lora_scale"] * leaves["lora_b"])

    @staticmethod
    def fold(leaves: Leaves) -> dict[str, Any]:
        """Gives `W + s A B`, summed in float32 and cast to the dtype of `W` once."""
        scale = leaves["lora_scale"][..., None, None]
        delta = jnp.matmul(leaves["lora_a"], scale * leaves["lora_b"], precision="highest")
        kernel = leaves["kernel"]
        return {**leaves, "kernel": (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)}


def dropout(key: jax.Array, rate: jax.Array, x: jax.Array) -> jax.Array:
    """Zeroes each element with probability `rate` and scales the others by 1 / (1 - rate).

    Args:
        key: a key.
        rate: scalar, below 1.
        x: any shape, floating; the result has its shape and dtype.
    """
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate).astype(x.dtype), jnp.zeros((), x.dtype))
